"""Verification of a home's ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path

from everstep.cli.common import output
from everstep.cli.common.ledger import open_ledger
from everstep.ledger.sqlite.copy import check_database


def verify_ledger(home: Path, as_json: bool) -> bool:
    """Verify a ledger and print the damaged rows.

    Args:
        home: the home.
        as_json: print JSON.

    Returns:
        Whether every row is intact.
    """
    damaged = asyncio.run(_damaged(home))
    if as_json:
        output.print_json({"ok": not damaged, "damaged": damaged})
        return not damaged
    for each in damaged:
        print(each)
    count = output.counted(len(damaged), "row")
    print(f"Damaged: {count}." if damaged else "Every row is intact.")
    return not damaged


async def _damaged(home: Path) -> list[str]:
    await asyncio.to_thread(check_database, home / "ledger.sqlite")
    async with open_ledger(home, read_only=True) as ledger:
        return await ledger.find_damaged_rows()
