"""Ledger: operations are accepted once and durable before they are acknowledged."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import OperationalError
from typing import Any

import pytest
from sqlalchemy import Connection

from everstep.ledger import (
    Checkpoint,
    Failure,
    Ledger,
    LedgerError,
    LedgerLocked,
    LedgerTooNew,
    NewOperation,
    NotWritten,
    Run,
    SequenceConflict,
    Session,
)
from everstep.ledger.sqlite.database import open_read_only


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def test_retry_gets_the_first_operation_and_a_different_request_is_rejected(tmp_path: Path) -> None:
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
        await ledger.succeed(ids[1], b"late", "json")  # has no effect: the first end counts
        await ledger.close()
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        found = [await ledger.operation(i) for i in (*ids, born.request_id)]
        assert [o.status for o in found if o] == ["succeeded", "failed", "pending", "failed"]
        assert [o.seq_id for o in await ledger.operations("r", status="pending")] == [3]
        assert found[3] is not None and found[3].failure == Failure("wrong", "user")
        await ledger.close()

    run(work())


def test_failed_creation_gives_up_its_seq_id_and_keeps_its_future(tmp_path: Path) -> None:
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


def test_concurrent_callers_share_commits(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        before = ledger.commits
        await asyncio.gather(*(ledger.accept(NewOperation("r", i, "k", b"")) for i in range(300)))
        assert ledger.commits - before < 50
        await ledger.close()

    run(work())


def test_rejected_request_leaves_the_others_of_its_commit_intact(tmp_path: Path) -> None:
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


def test_late_failure_of_a_replaced_creation_keeps_its_successor(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        moment = datetime.now(UTC)
        record = Run("r", "s", "m", {}, {}, {}, moment, moment)
        create = NewOperation("r", 0, "create", b"")
        first, _ = await ledger.accept(create, run=record)
        await ledger.fail(first.request_id, "no", "server")
        assert await ledger.run("r") is None
        await ledger.accept(create, run=record, replace_failed=True)
        await ledger.fail(first.request_id, "no", "server")
        assert await ledger.run("r") is not None
        await ledger.close()

    run(work())


def test_late_success_does_not_restore_a_deleted_checkpoint(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        saved = Checkpoint("p", "r", "training", "n", datetime.now(UTC), 1, "m", {}, {}, {}, None)
        operation, _ = await ledger.accept(NewOperation("r", 1, "save_state", b""))
        await ledger.succeed(operation.request_id, b"", "json", checkpoint=saved)
        assert await ledger.delete_checkpoint("p")
        await ledger.succeed(operation.request_id, b"", "json", checkpoint=saved)
        assert await ledger.checkpoint("p") is None
        await ledger.close()

    run(work())


def test_nothing_is_acknowledged_when_the_database_rolls_a_transaction_back(
    tmp_path: Path,
) -> None:
    """SQLite may do so on a full disk. Here a statement requests it."""

    def roll_back(connection: Connection) -> None:
        connection.exec_driver_sql(
            "INSERT OR ROLLBACK INTO operations SELECT * FROM operations LIMIT 1"
        )

    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        await ledger.accept(NewOperation("r", 0, "k", b""))
        holding, queued = threading.Event(), threading.Event()

        def hold(_connection: Connection) -> None:
            holding.set()
            queued.wait(30)

        held = asyncio.ensure_future(ledger._store.run(hold))
        await asyncio.to_thread(holding.wait, 30)
        together: list[Coroutine[Any, Any, object]] = [
            ledger.accept(NewOperation("r", i, "k", b"")) for i in (1, 2)
        ]
        together.append(ledger._store.run(roll_back))
        together += [ledger.accept(NewOperation("r", i, "k", b"")) for i in (3, 4)]
        tasks = [asyncio.ensure_future(each) for each in together]
        await asyncio.sleep(0)  # all are queued behind the call that holds the thread
        queued.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await held
        assert [type(outcome) for outcome in outcomes] == [NotWritten] * 5, outcomes
        assert [o.seq_id for o in await ledger.operations("r")] == [0]
        await ledger.accept(NewOperation("r", 1, "k", b""))  # the ledger still works
        await ledger.close()

    run(work())


def test_nothing_is_acknowledged_when_the_disk_is_full(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        count = "PRAGMA page_count"
        empty = await ledger._store.run(lambda c: c.exec_driver_sql(count).scalar_one())
        limit = f"PRAGMA max_page_count = {empty + 4}"
        await ledger._store.run(lambda c: c.exec_driver_sql(limit))
        calls = [ledger.accept(NewOperation("r", i, "k", bytes(9000))) for i in range(40)]
        first, _ = await calls[0]
        outcomes = await asyncio.gather(*calls[1:], return_exceptions=True)
        accepted = [o[0].seq_id for o in outcomes if not isinstance(o, BaseException)]
        good = [first.seq_id, *accepted]
        assert len(good) < 40
        assert [o.seq_id for o in await ledger.operations("r")] == good
        await ledger.close()

    run(work())


def test_every_commit_is_synced(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")

        def pragma(name: str) -> Coroutine[Any, Any, Any]:
            return ledger._store.run(lambda c: c.exec_driver_sql(f"PRAGMA {name}").scalar())

        assert await pragma("journal_mode") == "wal"
        assert await pragma("synchronous") == 2  # FULL
        await ledger.close()

    run(work())


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_one_connection_reads_writes_and_checkpoints(tmp_path: Path) -> None:
    """A single connection avoids SQLite's WAL-reset bug, whichever build Python carries."""
    path = tmp_path / "l.sqlite"

    def opened(name: str) -> int:
        links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
        return sum(str(link.readlink()) == str(tmp_path / name) for link in links)

    async def work() -> None:
        ledger = await Ledger.open(path)
        for start in range(0, 600, 100):  # SQLite checkpoints at 1000 pages
            await asyncio.gather(
                *(
                    ledger.accept(NewOperation("r", start + i, "k", bytes(9000)))
                    for i in range(200)
                ),
                *(ledger.operations("r") for _ in range(5)),
                *(ledger.search.list_runs(1, 0, None) for _ in range(5)),
            )
            assert opened("l.sqlite") == opened("l.sqlite-wal") == 1
        assert path.stat().st_size > 2_000_000, "it was checkpointed"
        assert (tmp_path / "l.sqlite-wal").stat().st_size
        await ledger.close()

    run(work())


def test_read_only_connection_cannot_run_a_wal_checkpoint(tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        return {name: (tmp_path / name).read_bytes() for name in ("l.sqlite", "l.sqlite-wal")}

    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        await ledger.accept(NewOperation("r", 1, "k", bytes(50_000)))
        before = files()
        reader = open_read_only(tmp_path / "l.sqlite")
        with reader.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM operations").scalar() == 1
            connection.rollback()
            sqlite = connection.connection.driver_connection
            assert sqlite is not None
            with pytest.raises(OperationalError):
                sqlite.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        reader.dispose()
        assert before["l.sqlite-wal"] and files() == before
        await ledger.close()

    run(work())


def test_closed_ledger_raises_and_completes_queued_calls(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        last = asyncio.ensure_future(ledger.accept(NewOperation("r", 1, "k", b"")))
        await asyncio.sleep(0)
        await ledger.close()
        assert (await last)[1]
        with pytest.raises(LedgerError, match="closed"):
            await ledger.accept(NewOperation("r", 2, "k", b""))

    run(work())


def test_second_service_is_locked_out(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        with pytest.raises(LedgerLocked, match="in use by another everstep service"):
            await Ledger.open(tmp_path / "l.sqlite")
        await ledger.close()
        await (await Ledger.open(tmp_path / "l.sqlite")).close()

    run(work())


def test_database_of_a_newer_release_is_rejected(tmp_path: Path) -> None:
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
def test_acknowledged_operations_survive_a_kill(tmp_path: Path, acknowledged: int) -> None:
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


def test_executed_seconds_are_added_up_after_a_position(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        for scope in ("a", "b", "c"):
            for seq_id in range(4):
                kind = "forward" if seq_id == 1 else "optim_step"
                new, _ = await ledger.accept(NewOperation(scope, seq_id, kind, b""))
                if scope == "c":
                    await ledger.fail(new.request_id, "no", "user")
                else:
                    await ledger.succeed(new.request_id, b"", "json", seconds=10.0**seq_id)
        positions = {"a": 0, "b": 2, "c": 0, "unknown": 0}
        positions.update({f"other {number}": 0 for number in range(500)})
        found = await ledger.search.executed_seconds(positions, {"optim_step"})
        assert found == {"a": 1100.0, "b": 1000.0}
        await ledger.close()

    run(work())


def test_corrupted_runs_and_finished_sessions_are_not_replayable(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        moment = datetime.now(UTC)
        for name in ("open", "ended"):
            session = Session(name, {}, [], "", None, None, moment, moment)
            await ledger.create_session(session, None)
            for number in range(2):
                record = Run(f"{name} {number}", name, "m", {}, {}, {}, moment, moment)
                new = NewOperation(record.run_id, 0, "create_model", b"")
                await ledger.accept(new, run=record)
        await ledger.mark_corrupted("open 1", "damaged")
        await ledger.finish_session("ended", "success", None)
        assert await ledger.search.replayable_runs() == ["open 0"]
        await ledger.close()

    run(work())


def test_operation_that_arrives_after_its_run_was_marked_corrupted_fails(tmp_path: Path) -> None:
    async def work() -> None:
        ledger = await Ledger.open(tmp_path / "l.sqlite")
        moment = datetime.now(UTC)
        record = Run("a", "session", "m", {}, {}, {}, moment, moment)
        await ledger.accept(NewOperation("a", 0, "create_model", b""), run=record)
        admitted_before = NewOperation("a", 1, "optim_step", b"{}")
        refused_before = NewOperation("a", 2, "optim_step", b"{}", Failure("wrong", "user"))
        await ledger.mark_corrupted("a", "damaged")
        late, new = await ledger.accept(admitted_before)
        assert new
        assert (late.status, late.failure) == ("failed", Failure("damaged", "server"))
        refused, _ = await ledger.accept(refused_before)
        assert refused.failure == Failure("wrong", "user")
        await ledger.close()

    run(work())
