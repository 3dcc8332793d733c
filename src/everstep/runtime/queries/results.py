"""Results: reads the results of passes that are left in the payload log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from everstep.ledger import Ledger, Operation
from everstep.ledger.payload_log.log import FilePart


class Results:
    """Results of operations that ended.

    Args:
        ledger: holds them.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def filled(self, operation: Operation) -> Operation:
        """Return an operation with its result. Raises `LedgerDamaged`."""
        return await self._ledger.contents.fill(operation, payload=False)

    @asynccontextmanager
    async def file(self, operation: Operation) -> AsyncIterator[FilePart | None]:
        """Verify a result where it lies, and keep it there for the duration of the block.

        Yields:
            The part of a file that holds it, or None where none does.

        Raises:
            LedgerDamaged: it is damaged.
        """
        async with self._ledger.contents.held(operation, "result") as found:
            if found is None:
                yield None
                return
            part, at = found
            await self._ledger.contents.verify_result(operation, at)
            yield part
