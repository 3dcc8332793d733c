"""The ledger: accepted once, durable before it is answered."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from everstep.ledger import (
    Failure,
    Ledger,
    LedgerLocked,
    LedgerTooNew,
    NewOperation,
    SequenceConflict,
)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def test_a_retry_finds_the_first_and_a_different_request_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        new = NewOperation("run", 1, "optim_step", b"a")
        answers = await asyncio.gather(*(ledger.accept(new) for _ in range(20)))
        assert len({operation.request_id for operation, _ in answers}) == 1
        assert sum(is_new for _, is_new in answers) == 1
        with pytest.raises(SequenceConflict):
            await ledger.accept(NewOperation("run", 1, "optim_step", b"b"))
        other, _ = await ledger.accept(
            NewOperation("run", 1, "optim_step", b"b"), match_payload=False
        )
        assert other.request_id == answers[0][0].request_id
        await ledger.close()

    run(work())


def test_results_failures_and_futures_survive_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        ids = [
            (await ledger.accept(NewOperation("r", i, "k", b"")))[0].request_id for i in (1, 2, 3)
        ]
        born, _ = await ledger.accept(NewOperation("r", 4, "k", b"", Failure("wrong", "user")))
        await ledger.succeed(ids[0], b"{}", "json")
        await ledger.fail(ids[1], "no", "server")
        await ledger.succeed(ids[1], b"late", "json")  # the first end counts
        await ledger.close()
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        found = [await ledger.operation(i) for i in (*ids, born.request_id)]
        assert [o.status for o in found if o] == ["succeeded", "failed", "pending", "failed"]
        assert [o.seq_id for o in await ledger.unfinished()] == [3]
        assert found[3] is not None and found[3].failure == Failure("wrong", "user")
        await ledger.close()

    run(work())


def test_a_failed_creation_gives_its_place_up_and_its_future_stays(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        first, _ = await ledger.accept(NewOperation("r", 0, "create", b"", Failure("no", "user")))
        second, is_new = await ledger.accept(
            NewOperation("r", 0, "create", b"x"), replace_failed=True
        )
        assert is_new and second.request_id != first.request_id
        old = await ledger.operation(first.request_id)
        assert old is not None and old.status == "failed"
        await ledger.close()

    run(work())


def test_callers_at_the_same_time_share_commits(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        before = ledger.commits
        await asyncio.gather(*(ledger.accept(NewOperation("r", i, "k", b"")) for i in range(300)))
        assert ledger.commits - before < 50
        await ledger.close()

    run(work())


def test_one_bad_request_harms_no_other_of_its_commit(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        await ledger.accept(NewOperation("r", 1, "k", b"a"))
        outcomes = await asyncio.gather(
            ledger.accept(NewOperation("r", 1, "k", b"other")),
            *(ledger.accept(NewOperation("r", i, "k", b"")) for i in range(2, 9)),
            return_exceptions=True,
        )
        assert isinstance(outcomes[0], SequenceConflict)
        assert len(await ledger.operations("r")) == 8
        await ledger.close()

    run(work())


def test_a_second_process_is_refused_naming_the_first(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        with pytest.raises(LedgerLocked, match="in use by another everstep service"):
            await Ledger.open(tmp_path / "l.sqlite")
        await ledger.close()
        await (await Ledger.open(tmp_path / "l.sqlite")).close()

    run(work())


def test_a_database_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    import sqlite3

    run(_open_and_close(tmp_path))
    with sqlite3.connect(tmp_path / "l.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(LedgerTooNew, match="9999"):
        run(_open_and_close(tmp_path))


async def _open_and_close(tmp_path: Path) -> None:
    await (await Ledger.open(tmp_path / "l.sqlite")).close()


_WRITER = """
import asyncio, sys
from pathlib import Path
from everstep.ledger import Ledger, NewOperation

async def main():
    ledger = await Ledger.open(Path(sys.argv[1]))
    for i in range(100000):
        operation, _ = await ledger.accept(NewOperation("r", i, "k", b"x" * 100))
        print(operation.request_id, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("acknowledged", [1, 20, 150])
def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path, acknowledged: int) -> None:
    path = tmp_path / "l.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    ids = [process.stdout.readline().strip() for _ in range(acknowledged)]
    process.kill()
    ids += process.stdout.read().split()
    process.wait()
    process.stdout.close()

    async def work() -> None:
        ledger = await Ledger.open(path)
        operations = await ledger.operations("r")
        assert [o.seq_id for o in operations] == list(range(len(operations)))
        assert {i for i in ids if len(i) == 32} <= {o.request_id for o in operations}
        await ledger.close()

    run(work())
