"""Recorded samples: written with the sample's success, checked on read, kept after a use."""

from __future__ import annotations

import asyncio
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from everstep.ledger import (
    Failure,
    Ledger,
    LedgerDamaged,
    NewOperation,
    RecordedSample,
    sample_rows,
)

RUN, SAMPLER = "s:train:0", "s:sample:0"
HOUR = timedelta(hours=1)


async def record(ledger: Ledger, number: int) -> str:
    """Accept a sample and finish it with a record; returns its request id."""
    new = NewOperation(SAMPLER, number, "sample", b"{}", None, "s", is_sample=True)
    operation, _ = await ledger.accept(new)
    kept = RecordedSample(operation.request_id, "s", b"prompt", bytes(5000) + bytes([number % 256]))
    recorded = ledger.samples.recorded
    for _ in range(2):  # the second time, it has ended already
        await recorded.succeed(operation.request_id, b"result", seconds=1.0, recorded=kept)
    return operation.request_id


async def last_use(ledger: Ledger, request_id: str) -> datetime:
    found = (await ledger.samples.recorded.read([request_id]))[request_id].last_used_at
    assert found is not None
    return found


def test_sample_and_record_are_written_together(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "ledger.sqlite"
        ledger = await Ledger.open(path)
        request_id = await record(ledger, 0)
        await ledger.close()
        ledger = await Ledger.open(path)
        (sample,) = await ledger.operations(SAMPLER)
        assert (sample.status, sample.result, sample.pruned) == ("succeeded", b"result", True)
        found = await ledger.samples.recorded.read([request_id, "unknown"])
        assert list(found) == [request_id]
        assert (found[request_id].prompt, found[request_id].session_id) == (b"prompt", "s")
        assert len(found[request_id].sequences) == 5001
        assert await ledger.find_damaged_rows() == []
        await ledger.close()

    asyncio.run(work())


def test_accepted_use_restarts_the_retention(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "ledger.sqlite")
        used, other = await record(ledger, 0), await record(ledger, 1)
        before, untouched = await last_use(ledger, used), await last_use(ledger, other)
        wrong = Failure("wrong", "user")
        await ledger.accept(NewOperation(RUN, 1, "forward", b"a", wrong, "s", uses=(used,)))
        assert await last_use(ledger, used) == before
        await ledger.accept(NewOperation(RUN, 2, "forward", b"b", None, "s", uses=(used, "gone")))
        assert await last_use(ledger, used) > before
        assert await last_use(ledger, other) == untouched
        assert await ledger.find_damaged_rows() == []
        await ledger.close()

    asyncio.run(work())


def test_unused_records_are_removed_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_rows, "REMOVED_AT_ONCE", 2)

    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "ledger.sqlite")
        made = [await record(ledger, number) for number in range(5)]
        recorded = ledger.samples.recorded
        assert await recorded.remove_unused(datetime.now(UTC) - HOUR) == 0
        border = await last_use(ledger, made[-1])
        assert await recorded.remove_unused(border) == 4
        assert list(await recorded.read(made)) == [made[-1]]
        await ledger.close()

    asyncio.run(work())


@pytest.mark.parametrize("column", ["prompt", "sequences", "session_id", "digest"])
def test_damaged_record_is_never_returned(column: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"

    async def fill() -> str:
        ledger = await Ledger.open(path)
        made = await record(ledger, 0)
        await ledger.close()
        return made

    request_id = asyncio.run(fill())
    with sqlite3.connect(path) as database:
        kind = "TEXT" if column == "session_id" else "BLOB"
        database.execute(f"UPDATE recorded_samples SET {column} = CAST({column} || 'x' AS {kind})")

    async def look() -> None:
        ledger = await Ledger.open(path)
        with pytest.raises(LedgerDamaged, match=request_id):
            await ledger.samples.recorded.read([request_id])
        (damage,) = await ledger.find_damaged_rows()
        assert request_id in damage
        await ledger.close()

    asyncio.run(look())
