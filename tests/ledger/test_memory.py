"""Rows in memory: what is read is always what was committed last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection

from everstep.ledger import (
    Ledger,
    LedgerDamaged,
    NewOperation,
    NotWritten,
    Operation,
    Run,
    Sampler,
    Session,
    SessionFinished,
)
from everstep.ledger import memory as memory_module
from everstep.ledger.memory import MAX_ENDED_BYTES, Memory, Remembered

MOMENT = datetime(2026, 1, 2, tzinfo=UTC)
RUN = Run("r", "s", "m", {"rank": 4}, {}, {}, MOMENT, MOMENT)
SESSION = Session("s", {}, [], "0.1", None, None, MOMENT, MOMENT)
SAMPLER = Sampler("x", "s", "m", None, MOMENT)


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Ledger]:
    ledger = await Ledger.open(home / "ledger.sqlite")
    try:
        yield ledger
    finally:
        await ledger.close()


def new(seq_id: int, payload: bytes = b"{}") -> NewOperation:
    return NewOperation("r", seq_id, "optim_step", payload, None, "s")


async def filled(ledger: Ledger) -> Operation:
    """Create a session, a run and a sampler, read them, and return the run's creation."""
    await ledger.create_session(SESSION, None)
    await ledger.create_sampler(SAMPLER)
    created, _ = await ledger.accept(NewOperation("r", 0, "create", b"", None, "s"), run=RUN)
    assert await ledger.run("r") == RUN
    assert await ledger.sampler("x") == SAMPLER
    return created


def test_rows_in_memory_follow_every_write(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            created = await filled(ledger)
            used, _ = await ledger.accept(new(1))
            assert await ledger.run("r") == replace(RUN, last_request_at=used.accepted_at)
            await ledger.succeed(created.request_id, b"{}", "json", environment={"torch": "2"})
            found = await ledger.run("r")
            assert found is not None and found.environment == {"torch": "2"}
            assert await ledger.samples.add_client("x") == 1
            assert await ledger.sampler("x") == replace(SAMPLER, clients=1)
            (failed,) = await ledger.mark_corrupted("r", "damaged")
            found = await ledger.run("r")
            assert found is not None and (found.status, found.fault) == ("corrupted", "damaged")
            assert await ledger.operation(used.request_id) == failed

    asyncio.run(work())


def test_run_whose_creation_failed_is_gone(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            created = await filled(ledger)
            await ledger.fail(created.request_id, "no", "user")
            assert await ledger.run("r") is None

    asyncio.run(work())


def test_dropped_result_is_not_served(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await filled(ledger)
            sample, _ = await ledger.accept(NewOperation("x", 0, "sample", b"", is_sample=True))
            recorded = ledger.samples.recorded
            await recorded.succeed(sample.request_id, b"tokens", seconds=0.1, recorded=None)
            found = await ledger.operation(sample.request_id)
            assert found is not None and found.result == b"tokens"
            await ledger.samples.drop_results("x", range(9), [sample.request_id])
            found = await ledger.operation(sample.request_id)
            assert found is not None and (found.result, found.retrieved) == (None, True)

    asyncio.run(work())


def test_pruned_payload_is_not_served(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await filled(ledger)
            step, _ = await ledger.accept(new(1))
            await ledger.succeed(step.request_id, b"{}", "json")
            assert await ledger.prune("r", after=0, upto=1, kinds=["optim_step"]) == 1
            found = await ledger.operation(step.request_id)
            assert found is not None and (found.payload, found.pruned) == (b"", True)

    asyncio.run(work())


def test_writes_that_are_rolled_back_are_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await filled(ledger)
            step, _ = await ledger.accept(new(1))
            before = await ledger.run("r")

            def lose(connection: Connection) -> None:
                connection.exec_driver_sql("INSERT OR ROLLBACK INTO runs SELECT * FROM runs")

            outcomes = await asyncio.gather(
                ledger.accept(new(2)),
                ledger.succeed(step.request_id, b"lost", "json"),
                ledger.mark_corrupted("r", "lost"),
                ledger.run("r"),
                ledger._store.run(lose),
                return_exceptions=True,
            )
            written = [isinstance(each, NotWritten) for each in outcomes]
            assert written[:3] == [True] * 3
            assert await ledger.run("r") == before
            found = await ledger.operation(step.request_id)
            assert found is not None and found.status == "pending"

    asyncio.run(work())


def test_accept_sees_the_end_of_the_session_in_its_own_transaction(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await filled(ledger)
            first, _ = await ledger.accept(new(1), open_session=True)
            outcomes = await asyncio.gather(
                ledger.finish_session("s", "success", None),
                ledger.accept(new(2), open_session=True),
                ledger.accept(new(1), open_session=True),
                ledger.accept(new(3)),
                return_exceptions=True,
            )
            assert isinstance(outcomes[1], SessionFinished)
            assert "is finished (success)" in str(outcomes[1])
            assert outcomes[2] == (first, False), "a retry is no new operation"
            assert [each.seq_id for each in await ledger.operations("r")] == [0, 1, 3]

    asyncio.run(work())


@pytest.mark.parametrize(("table", "column"), [("sessions", "finished"), ("runs", "base_model")])
def test_accept_reports_a_damaged_session_or_run(table: str, column: str, tmp_path: Path) -> None:
    def damage(connection: Connection) -> int:
        return connection.exec_driver_sql(f"UPDATE {table} SET {column} = 'x'").rowcount

    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await filled(ledger)
            assert await ledger._store.run(damage) == 1
            with pytest.raises(LedgerDamaged, match=table):
                await ledger.accept(new(1), open_session=True)

    asyncio.run(work())


def test_ledger_beside_the_service_reads_what_the_service_wrote_last(tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as ledger:
            await filled(ledger)
            step, _ = await ledger.accept(new(1))
            await ledger.succeed(step.request_id, b"{}", "json")
            beside = await Ledger.open_read_only(tmp_path / "ledger.sqlite")
            for fault in (None, "damaged"):
                if fault is not None:
                    await ledger.mark_corrupted("r", fault)
                found = await beside.run("r")
                assert found is not None and found.fault == fault
            assert beside._memory.ended.get(step.request_id) is None
            await beside.operation(step.request_id)
            assert beside._memory.ended.get(step.request_id) is None
            await beside.close()

    asyncio.run(work())


def test_operations_in_memory_are_bounded_by_their_bytes() -> None:
    def operation(index: int, size: int) -> Operation:
        name = str(index)
        return Operation(
            name, "r", index, "k", b"", "succeeded", bytes(size), "json", None, MOMENT, MOMENT
        )

    memory, size = Memory(enabled=True), MAX_ENDED_BYTES // 32
    memory.finished(operation(0, MAX_ENDED_BYTES // 8))
    assert memory.ended.get("0") is None, "one may not displace all others"
    for index in range(1, 101):
        memory.finished(operation(index, size))
    held = [index for index in range(1, 101) if memory.ended.get(str(index)) is not None]
    assert held == list(range(70, 101))


def test_rows_in_memory_are_bounded_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "MAX_ROWS", 10)
    runs: Remembered[Run] = Memory(enabled=True).runs
    for index in range(100):
        runs.put(str(index), RUN)
    assert [index for index in range(100) if runs.get(str(index))] == list(range(90, 100))
