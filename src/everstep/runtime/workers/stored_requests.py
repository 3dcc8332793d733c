"""Stored requests: how a worker gets the request of an accepted operation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from everstep.ledger import Ledger, Operation
from everstep.worker.protocol.stored_request import StoredRequest


@asynccontextmanager
async def request_of(
    ledger: Ledger, home: Path, operation: Operation, *, as_bytes: bool = False
) -> AsyncIterator[tuple[bytes, StoredRequest | None]]:
    """Give a worker the request of an operation. The only place that decides how it gets there.

    Hold the block open until the worker has replied: what a command names stays where it is as
    long.

    Args:
        ledger: holds the operation.
        home: of the service.
        operation: the operation, with or without its contents.
        as_bytes: the worker does not see the home, or could not read the request there.

    Yields:
        The request where the command has to hold it, or where it is stored.

    Raises:
        LedgerDamaged: it was read here, and is damaged.
    """
    async with ledger.contents.held(operation) as found:
        if found is None or as_bytes:
            filled = await ledger.contents.fill(operation)
            yield filled.payload, None
            return
        part, at = found
        path = part.path.relative_to(home).as_posix()
        yield b"", StoredRequest(path, part.offset, at.size, at.digest.hex())
