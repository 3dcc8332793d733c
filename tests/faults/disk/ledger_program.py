"""Ledger program: accepts a few operations in a row and reports their acknowledgements."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

from everstep.ledger import Ledger, NewOperation, NotWritten
from everstep.testing.history import Reporter
from everstep.testing.invariants import LEDGER, RUNS, digest, operation_of, operation_value

OPERATIONS = 8


def live(events: int, home: str) -> None:
    """Accept the operations, also after failures, and report the end."""
    reporter = Reporter(events)
    asyncio.run(_accept(Path(home), reporter))
    reporter.report(done=True)


async def _accept(home: Path, reporter: Reporter) -> None:
    ledger = await Ledger.open(home / LEDGER)
    for number in range(OPERATIONS):
        payload = bytes([number]) * 5000
        value = {"payload": digest(payload), "status": "pending"}
        thing = operation_of(RUNS[0], number)
        with contextlib.suppress(NotWritten), reporter.doing({thing: value}) as after:
            operation, _ = await ledger.accept(NewOperation(RUNS[0], number, "step", payload))
            after[thing] = operation_value(operation)
    await ledger.close()


if __name__ == "__main__":
    live(1, sys.argv[1])
