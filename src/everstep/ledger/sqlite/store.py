"""SQLite store: one file, one process, one connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, Engine

from everstep.ledger.operation_rows import named_segments
from everstep.ledger.payload_log.segments import SegmentFiles
from everstep.ledger.sqlite.commit_counter import CommitCounter, check_complete, check_not_missing
from everstep.ledger.sqlite.copy import check_database, copy_database
from everstep.ledger.sqlite.database import HomeLock, database_errors, open_engine, open_read_only
from everstep.ledger.sqlite.group_commit import GroupCommit

Result = TypeVar("Result")


class SqliteStore:
    """A `Store` on a SQLite file. Reads and writes go through the same connection, in order.

    Args:
        path: the database file.
        engine: the open database.
        payloads: the payload log beside it.
        lock: keeps other processes out, or None for a store that only reads.
        counter: counts durable transactions, or None for a store that only reads.
    """

    def __init__(
        self,
        path: Path,
        engine: Engine,
        payloads: SegmentFiles,
        lock: HomeLock | None = None,
        counter: CommitCounter | None = None,
    ) -> None:
        self._path = path
        self._engine = engine
        self._lock = lock
        self._counter = counter
        self.payloads = payloads
        self._group_commit = GroupCommit(engine, counter)

    @classmethod
    async def open(cls, path: Path, *, allow_missing: bool = False) -> SqliteStore:
        """Open the database at a path, creating or migrating it.

        Args:
            path: the database file.
            allow_missing: create an empty database even where one was here and is gone.

        Raises:
            LedgerLocked: another process has it open.
            LedgerTooNew: a newer release wrote it.
            LedgerDamaged: it can't be read, or lacks acknowledged transactions.
        """
        lock = HomeLock(path.with_name(path.name + ".lock"))
        try:
            return await asyncio.to_thread(cls._open, path, lock, allow_missing)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _open(cls, path: Path, lock: HomeLock, allow_missing: bool) -> SqliteStore:
        check_not_missing(path, allow_missing=allow_missing)
        engine = open_engine(path)
        try:
            counter = CommitCounter(path, engine)
            payloads = SegmentFiles(path, counter.identity)
            with database_errors(path), engine.begin() as connection:
                named = named_segments(connection)
            payloads.recover(named)
            return cls(path, engine, payloads, lock, counter)
        except BaseException:
            engine.dispose()
            raise

    @classmethod
    async def open_read_only(cls, path: Path) -> SqliteStore:
        """Open the database beside the service that has it. A write raises `NotWritten`.

        Raises:
            LedgerError: it doesn't exist, or has another schema than this release's.
            LedgerDamaged: it can't be read, or lacks acknowledged transactions.
        """
        return await asyncio.to_thread(cls._open_read_only, path)

    @classmethod
    def _open_read_only(cls, path: Path) -> SqliteStore:
        engine = open_read_only(path)
        try:
            identity, _ = check_complete(path, engine)
        except BaseException:
            engine.dispose()
            raise
        return cls(path, engine, SegmentFiles(path, identity.hex()))

    @property
    def commits(self) -> int:
        """The number of transactions that were committed since the store was opened."""
        return self._group_commit.commits

    def listen(self, written: Callable[[frozenset[str]], None]) -> None:
        """Have a function called with the names of the tables that a call wrote to."""
        self._group_commit.listeners.append(written)

    async def run(
        self,
        work: Callable[[Connection], Result],
        then: Callable[[Result], None] | None = None,
    ) -> Result:
        """Run a function in a transaction and return its result once that is durable."""
        return await self._group_commit.run(work, then)

    async def read(
        self,
        work: Callable[[Connection], Result],
        then: Callable[[Result], None] | None = None,
    ) -> Result:
        """Run a function that writes nothing, after everything that was queued before it."""
        return await self._group_commit.run(work, then)

    async def backup(self, target: Path) -> None:
        """Copy everything that is committed to a new, durable database file."""
        await asyncio.to_thread(copy_database, self._path, target)

    async def check(self) -> None:
        """Raise `LedgerError` unless SQLite finds the file intact."""
        await asyncio.to_thread(check_database, self._path)

    async def close(self) -> None:
        """Run the calls that are queued, then release the file."""
        await asyncio.to_thread(self._group_commit.close)
        self.payloads.close()
        self._engine.dispose()
        if self._counter is not None:
            self._counter.close()
        if self._lock is not None:
            self._lock.release()
