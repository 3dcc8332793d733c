"""The newest checkpoints of runs: which they are, and that older ones cost nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection

from everstep.ledger import Checkpoint, Ledger, NewOperation, Run, checkpoint_index

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
RUNS = ("s:train:0", "s:train:1")
KINDS = ("training", "sampler")


def saved(run_id: str, number: int, kind: str = "training") -> Checkpoint:
    name = f"{number:05d}"
    segment = "weights" if kind == "training" else "sampler_weights"
    return Checkpoint(
        path=f"tinker://{run_id}/{segment}/{name}",
        run_id=run_id,
        kind=kind,
        name=name,
        created_at=BEGIN + timedelta(seconds=number),
        size_bytes=1,
        base_model="m",
        lora={},
        optimizer=None,
        user_metadata=None,
        expires_at=None,
    )


async def opened(path: Path, *checkpoints: Checkpoint) -> Ledger:
    ledger = await Ledger.open(path)
    for run_id in RUNS:
        record = Run(run_id, "s", "m", {}, {}, {}, BEGIN, BEGIN)
        await ledger.accept(NewOperation(run_id, 0, "create_model", b""), run=record)
    await ledger.insert_missing([], checkpoints)
    return ledger


def test_newest_of_each_kind_is_found_for_each_run(tmp_path: Path) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    hidden = [
        replace(saved(RUNS[0], 7), expires_at=past),
        replace(saved(RUNS[0], 8), quarantined=True),
        replace(saved(RUNS[0], 9), listed=False),
    ]
    shown = [saved(RUNS[0], 1), saved(RUNS[0], 3), saved(RUNS[0], 2, "sampler")]
    lasting = replace(saved(RUNS[0], 6), expires_at=datetime.now(UTC) + timedelta(days=1))

    async def work() -> None:
        ledger = await opened(tmp_path / "l.sqlite", *shown, *hidden, lasting)
        found = await ledger.search.newest_checkpoints(RUNS, KINDS)
        assert {run: [each.path for each in rows] for run, rows in found.items()} == {
            RUNS[0]: [lasting.path, shown[2].path],
            RUNS[1]: [],
        }
        await ledger.close()

    asyncio.run(work())


@pytest.mark.parametrize("kind", KINDS)
def test_older_checkpoints_cost_nothing(tmp_path: Path, kind: str) -> None:
    """Counted in instructions of SQLite's virtual machine, by tens."""
    tens = []

    async def work(count: int) -> None:
        rows = [saved(run, number, kind) for run in RUNS for number in range(count)]
        ledger = await opened(tmp_path / f"{count}.sqlite", *rows)

        def counted(connection: Connection) -> int:
            database = connection.connection.driver_connection
            seen = 0

            def count_ten() -> int:
                nonlocal seen
                seen += 1
                return 0

            assert database is not None
            database.set_progress_handler(count_ten, 10)
            found = checkpoint_index.newest(connection, RUNS, kind)
            database.set_progress_handler(None, 0)
            assert [each.name for each in found] == [f"{count - 1:05d}"] * 2
            return seen

        tens.append(await ledger._store.read(counted))
        await ledger.close()

    for count in (2, 500):
        asyncio.run(work(count))
    assert tens[1] <= tens[0] + 10
