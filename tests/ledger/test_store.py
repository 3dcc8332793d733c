"""Store: the promises of the ledger's seam, which every implementation has to keep."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select

from everstep.ledger import LedgerError
from everstep.ledger import tables as t
from everstep.ledger.sqlite.store import SqliteStore
from everstep.ledger.store import Store

Open = Callable[[Path], AbstractAsyncContextManager[Store]]


@asynccontextmanager
async def sqlite(home: Path) -> AsyncIterator[Store]:
    store = await SqliteStore.open(home / "ledger.sqlite")
    try:
        yield store
    finally:
        await store.close()


IMPLEMENTATIONS = [pytest.param(sqlite, id="sqlite")]
every_store = pytest.mark.parametrize("opened", IMPLEMENTATIONS)


def delete(path: str) -> Callable[[Connection], str]:
    """Return a statement that writes one row."""

    def work(connection: Connection) -> str:
        values = {"path": path, "deleted_at": datetime.now(UTC)}
        connection.execute(insert(t.deleted_checkpoints).values(**values))
        return path

    return work


def rows(connection: Connection) -> list[str]:
    query = select(t.deleted_checkpoints.c.path).order_by(t.deleted_checkpoints.c.path)
    return list(connection.execute(query).scalars())


@every_store
def test_run_returns_a_result_that_survives_a_restart(opened: Open, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as store:
            assert await store.run(delete("a")) == "a"
            assert await store.read(rows) == ["a"]
            assert store.commits > 0
        async with opened(tmp_path) as store:
            assert await store.read(rows) == ["a"]

    asyncio.run(work())


@every_store
def test_failed_call_undoes_its_own_writes_only(opened: Open, tmp_path: Path) -> None:
    def fail(connection: Connection) -> None:
        delete("failed")(connection)
        raise LookupError("on purpose")

    async def work() -> None:
        async with opened(tmp_path) as store:
            outcomes = await asyncio.gather(
                store.run(delete("a")),
                store.run(fail),
                store.run(delete("b")),
                return_exceptions=True,
            )
            assert [type(each) for each in outcomes] == [str, LookupError, str]
            assert await store.read(rows) == ["a", "b"]

    asyncio.run(work())


@every_store
def test_calls_run_in_order_and_see_earlier_writes(opened: Open, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as store:
            calls = [
                each for i in range(5) for each in (store.run(delete(str(i))), store.read(rows))
            ]
            results = await asyncio.gather(*calls)
            assert results[1::2] == [[str(i) for i in range(n + 1)] for n in range(5)]

    asyncio.run(work())


@every_store
def test_cancelled_call_that_has_not_started_does_not_run(opened: Open, tmp_path: Path) -> None:
    holding, release = threading.Event(), threading.Event()

    def hold(_connection: Connection) -> None:
        holding.set()
        assert release.wait(30)

    async def work() -> None:
        async with opened(tmp_path) as store:
            held = asyncio.ensure_future(store.run(hold))
            await asyncio.to_thread(holding.wait, 30)
            cancelled = asyncio.ensure_future(store.run(delete("a")))
            await asyncio.sleep(0)  # it is queued behind the call that holds the store
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            release.set()
            await held
            assert await store.read(rows) == []

    asyncio.run(work())


@every_store
def test_backup_holds_earlier_commits_only(opened: Open, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "ledger.sqlite"
    copy.parent.mkdir()

    async def work() -> None:
        async with opened(tmp_path) as store:
            await store.run(delete("a"))
            await store.backup(copy)
            await store.run(delete("b"))
        async with opened(copy.parent) as store:
            assert await store.read(rows) == ["a"]

    asyncio.run(work())


@every_store
def test_closed_store_rejects_calls(opened: Open, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as store:
            await store.run(delete("a"))
        for call in (store.run(delete("b")), store.read(rows)):
            with pytest.raises(LedgerError, match="closed"):
                await call
        async with opened(tmp_path) as again:
            assert await again.read(rows) == ["a"]

    asyncio.run(work())


def test_check_finds_a_damaged_sqlite_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"

    async def work() -> None:
        async with sqlite(tmp_path) as store:
            await store.run(delete("a"))
            await store.check()
        with sqlite3.connect(path) as database:
            (page,) = database.execute(
                "SELECT rootpage FROM sqlite_master WHERE name = 'deleted_checkpoints'"
            ).fetchone()
            (size,) = database.execute("PRAGMA page_size").fetchone()
        database.close()
        content = bytearray(path.read_bytes())
        content[(page - 1) * size : page * size] = b"\xff" * size
        path.write_bytes(content)
        store = await SqliteStore.open_read_only(path)
        try:
            with pytest.raises(LedgerError, match="is damaged"):
                await store.check()
        finally:
            await store.close()

    asyncio.run(work())


@every_store
def test_followers_are_called_in_order_before_the_caller(opened: Open, tmp_path: Path) -> None:
    async def work() -> None:
        async with opened(tmp_path) as store:
            seen: list[object] = []
            store.listen(seen.append)

            def fail(connection: Connection) -> None:
                delete("failed")(connection)
                raise LookupError("on purpose")

            def keep(result: object) -> None:
                seen.append(result)

            assert await store.run(delete("a"), keep) == "a"
            assert seen == [frozenset({"deleted_checkpoints"}), "a"]
            assert await store.read(rows, keep) == ["a"]
            assert seen[2:] == [["a"]]
            with pytest.raises(LookupError):
                await store.run(fail, keep)
            assert [each for each in seen[3:] if not isinstance(each, frozenset)] == []

    asyncio.run(work())


@every_store
def test_follower_is_called_though_its_caller_is_gone(opened: Open, tmp_path: Path) -> None:
    started, release = threading.Event(), threading.Event()

    def slow(connection: Connection) -> str:
        started.set()
        assert release.wait(30)
        return delete("a")(connection)

    async def work() -> None:
        async with opened(tmp_path) as store:
            seen: list[str] = []
            call = asyncio.ensure_future(store.run(slow, seen.append))
            await asyncio.to_thread(started.wait, 30)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            release.set()
            assert await store.read(rows) == ["a"]
            assert seen == ["a"]

    asyncio.run(work())
