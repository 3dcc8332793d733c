"""Compaction program: fills small segments of the payload log, then prunes most of each."""

from __future__ import annotations

import asyncio
from pathlib import Path

from everstep.ledger import Ledger, NewOperation
from everstep.testing.history import Reporter, Value
from everstep.testing.invariants import LEDGER, RUNS, digest, operation_of, operation_value
from tests.ledger.test_compaction import KEPT_EVERY, PER_SEGMENT, small
from tests.ledger.test_logged_contents import KIND, data, dropped

OPERATIONS = 2 * PER_SEGMENT + 1
_SCOPE, _RESULT = RUNS[0], b"{}"


def live(events: int, home: str) -> None:
    """Go on where the program before this one was when its power was cut."""
    reporter = Reporter(events)
    Path(home).mkdir(exist_ok=True)
    asyncio.run(_fill_and_prune(Path(home), reporter))
    reporter.report(done=True)


async def _fill_and_prune(home: Path, reporter: Reporter) -> None:
    ledger = await Ledger.open(home / LEDGER)
    small(ledger)
    known = await ledger.operations(_SCOPE, contents=False)
    for seq_id in range(len(known), len(known) + OPERATIONS):
        await _execute(ledger, seq_id, reporter)
    for each in await ledger.operations(_SCOPE, contents=False):
        if each.seq_id % KEPT_EVERY and each.status == "succeeded" and not each.pruned:
            pruned = _ended(each.request_id, payload=b"")
            with reporter.doing({operation_of(_SCOPE, each.seq_id): pruned}):
                await ledger.prune(_SCOPE, after=each.seq_id - 1, upto=each.seq_id, kinds=[KIND])
    await dropped(ledger)
    await ledger.close()


async def _execute(ledger: Ledger, seq_id: int, reporter: Reporter) -> None:
    thing, payload = operation_of(_SCOPE, seq_id), data(seq_id)
    with reporter.doing({thing: {"payload": digest(payload), "status": "pending"}}) as after:
        operation, _ = await ledger.accept(NewOperation(_SCOPE, seq_id, KIND, payload))
        after[thing] = operation_value(operation)
    with reporter.doing({thing: _ended(operation.request_id, payload)}):
        await ledger.succeed(operation.request_id, _RESULT, "json")


def _ended(request_id: str, payload: bytes) -> Value:
    return {
        "request_id": request_id,
        "payload": digest(payload),
        "status": "succeeded",
        "result": digest(_RESULT),
    }
