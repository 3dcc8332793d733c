"""Rows of every step: what is not read, checked or written again is still never wrong."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from everstep.ledger import Ledger, LedgerDamaged, LedgerError, NewOperation, NotWritten, Run
from everstep.ledger import operation_rows as rows
from everstep.ledger.payload_log.content import Content
from everstep.ledger.sqlite.store import SqliteStore

MOMENT = datetime(2026, 1, 2, tzinfo=UTC)
RUN = Run("r", "s", "m", {"rank": 4}, {}, {}, MOMENT, MOMENT)


def with_ledger(path: Path, work: Callable[[Ledger], Any]) -> Any:
    """Run a coroutine function on a ledger that holds a run."""

    async def run() -> Any:
        ledger = await Ledger.open(path / "ledger.sqlite")
        try:
            await ledger.accept(new(0), run=RUN)
            return await work(ledger)
        finally:
            await ledger.close()

    return asyncio.run(run())


def new(seq_id: int) -> NewOperation:
    return NewOperation("r", seq_id, "optim_step", b"{}", None, "s")


def used_in_row(ledger: Ledger) -> Any:
    """Return the last use of the run as its row has it."""
    query = "SELECT last_request_at FROM runs"
    return ledger._store.read(lambda c: c.exec_driver_sql(query).scalar_one())


def test_operation_whose_row_was_damaged_since_its_acceptance_can_not_end(tmp_path: Path) -> None:
    async def work(ledger: Ledger) -> None:
        step, _ = await ledger.accept(new(1))
        damage = "UPDATE operations SET kind = 'x' WHERE seq_id = 1"
        await ledger._store.run(lambda c: c.exec_driver_sql(damage))
        with pytest.raises(LedgerDamaged, match=step.request_id):
            await ledger.succeed(step.request_id, b"{}", "json")

    with_ledger(tmp_path, work)


def test_operation_whose_acceptance_was_undone_can_not_end(tmp_path: Path) -> None:
    async def work(ledger: Ledger) -> None:
        accepted: list[str] = []

        def accept(connection: Connection) -> None:
            made = rows.accept(
                connection,
                new(1),
                Content(b"{}"),
                None,
                replace_failed=False,
                match_payload=True,
                open_session=False,
            )
            accepted.append(made[0].request_id)
            raise LookupError("on purpose")

        with pytest.raises(LookupError):
            await ledger._store.run(accept)
        with pytest.raises(LedgerError, match="there is no operation"):
            await ledger.succeed(accepted[0], b"{}", "json")

    with_ledger(tmp_path, work)


def test_last_use_of_a_run_is_exact_while_its_row_is_written_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(ledger: Ledger) -> Run:
        await ledger.run("r")
        first, _ = await ledger.accept(new(1))
        written = await used_in_row(ledger)
        second, _ = await ledger.accept(new(2))
        assert second.accepted_at > first.accepted_at
        assert await used_in_row(ledger) == written, "not written for each"
        expected = replace(RUN, last_request_at=second.accepted_at)
        assert await ledger.run("r") == expected
        ledger._memory.runs.clear()
        assert await ledger.run("r") == expected
        assert await ledger.search.list_runs(9, 0) == ([expected], 1)
        third, _ = await ledger.accept(new(3))
        monkeypatch.setattr(rows, "_USE_INTERVAL", timedelta(0))
        fourth, _ = await ledger.accept(new(4))
        assert fourth.accepted_at > third.accepted_at
        assert await used_in_row(ledger) == str(fourth.accepted_at).removesuffix("+00:00")
        monkeypatch.undo()
        fifth, _ = await ledger.accept(new(5))
        return replace(RUN, last_request_at=fifth.accepted_at)

    async def look() -> None:
        ledger = await Ledger.open(tmp_path / "ledger.sqlite")
        assert await ledger.run("r") == expected, "written at the end"
        await ledger.close()

    expected = with_ledger(tmp_path, work)
    asyncio.run(look())


def test_runs_are_listed_while_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any) -> None:
        raise NotWritten("the disk is full")

    async def work(ledger: Ledger) -> None:
        await ledger.run("r")
        await ledger.accept(new(1))
        with monkeypatch.context() as patch:
            patch.setattr(ledger._store, "run", full)
            listed, total = await ledger.search.list_runs(9, 0)
        assert total == 1 and [each.run_id for each in listed] == ["r"]

    with_ledger(tmp_path, work)


def test_unfinished_operations_are_found_by_their_index(tmp_path: Path) -> None:
    async def work(ledger: Ledger) -> None:
        store = ledger._store
        assert isinstance(store, SqliteStore)
        found: list[tuple[str, Any]] = []

        def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            found.append((statement, parameters))

        await ledger.accept(new(1))
        event.listen(store._engine, "before_cursor_execute", note)
        assert [each.count for each in await ledger.backlog()] == [2]
        assert len(await ledger.operations("r", status="pending")) == 2
        assert len(await ledger.pending_operations(["optim_step"])) == 2
        assert (await store.read(lambda c: rows.queue(c, "r", 9))).last == 1
        assert len(await ledger.mark_corrupted("r", "no")) == 2
        event.remove(store._engine, "before_cursor_execute", note)

        def plan(connection: Connection, statement: str, parameters: Any) -> str:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            return str(rows.all())

        asked = [each for each in found if "status = 'pending'" in each[0]]
        assert len(asked) == 5
        for each in asked:
            used = await store.read(lambda c, each=each: plan(c, *each))  # type: ignore[misc]
            assert "operations_unfinished" in used, each

    with_ledger(tmp_path, work)


def test_failed_commit_leaves_no_open_transaction(tmp_path: Path) -> None:
    async def work(ledger: Ledger) -> None:
        def unbalanced(connection: Connection) -> None:
            connection.connection.driver_connection.execute("COMMIT")  # type: ignore[union-attr]
            raise sqlite3.OperationalError("on purpose")

        with pytest.raises(NotWritten, match="rolled back"):
            await ledger._store.run(unbalanced)
        step, is_new = await ledger.accept(new(1))
        assert is_new
        assert (await ledger.succeed(step.request_id, b"{}", "json")).status == "succeeded"

    with_ledger(tmp_path, work)
