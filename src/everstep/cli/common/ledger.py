"""The ledger of a home, opened without a service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from everstep.cli.common.options import existing_ledger
from everstep.ledger import Ledger


@asynccontextmanager
async def open_ledger(home: Path, *, read_only: bool = False) -> AsyncIterator[Ledger]:
    """Open the ledger of a home.

    Args:
        home: the home.
        read_only: read it beside a service. Otherwise no service may run on the home.

    Raises:
        Refused: the home has no ledger.
        LedgerLocked: a service runs on the home, and ``read_only`` is false.
    """
    path = existing_ledger(home)
    ledger = await (Ledger.open_read_only(path) if read_only else Ledger.open(path))
    try:
        yield ledger
    finally:
        await ledger.close()
