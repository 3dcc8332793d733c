"""Group commit: one thread with one connection runs every statement of the database.

SQLite 3.7.0 to 3.51.2 can lose commits when a WAL checkpoint of one connection races a commit of
another (the WAL-reset bug). With a single connection there is no such race, whichever build Python
carries. The single thread also commits in groups: the calls that arrive during one fsync share the
next transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Table, UpdateBase, event
from sqlalchemy.exc import DatabaseError, MultipleResultsFound

from everstep.failpoints import Failpoint
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerDamaged, LedgerError, NotWritten
from everstep.ledger.sqlite.commit_counter import CommitCounter
from everstep.ledger.sqlite.database import ADVICE

Result = TypeVar("Result")
_MAX_GROUP = 256
_WRITTEN = Failpoint("ledger.commit.written", "a transaction is written and not committed")
_COMMITTED = Failpoint("ledger.commit.committed", "a transaction is durable, its callers wait")


@dataclass(frozen=True)
class _Job:
    """A call: its function, and the future of its caller, which belongs to an event loop."""

    work: Callable[[Connection], Any]
    then: Callable[[Any], None] | None
    future: asyncio.Future[Any]


@dataclass(frozen=True)
class _Outcome:
    """What a job returned or raised, and the tables that it wrote to."""

    job: _Job
    result: Any = None
    failure: BaseException | None = None
    written: frozenset[str] = frozenset()

    def resolve(self) -> None:
        """Give it to the caller, in the caller's event loop."""
        future = self.job.future
        if future.done():  # cancelled
            return
        if self.failure is not None:
            future.set_exception(self.failure)
        else:
            future.set_result(self.result)


class GroupCommit:
    """Runs functions on the connection, several in one transaction.

    Args:
        engine: the database.
        counter: counts durable transactions, or None for a database that is only read.

    Attributes:
        commits: the number of transactions that were committed.
        listeners: called with the names of the tables that a call wrote to, see `Store.listen`.
    """

    def __init__(self, engine: Engine, counter: CommitCounter | None) -> None:
        self.commits = 0
        self.listeners: list[Callable[[frozenset[str]], None]] = []
        self._counter = counter
        self._engine = engine
        self._begin = "BEGIN" if counter is None else "BEGIN IMMEDIATE"
        self._written: set[str] = set()
        event.listen(engine, "before_execute", self._note)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._gate = threading.Lock()  # no job is queued after the end
        self._thread = threading.Thread(target=self._live, name="ledger", daemon=True)
        self._thread.start()

    async def run(
        self,
        work: Callable[[Connection], Result],
        then: Callable[[Result], None] | None = None,
    ) -> Result:
        """Run a function in a transaction and return once that is durable.

        Args:
            work: gets the connection. An exception undoes its own writes and no other job's.
            then: gets the result once that is durable, see `Store.run`.

        Raises:
            NotWritten: the commit failed, so nothing was written.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        with self._gate:
            if self._closed:
                raise LedgerError("the ledger is closed")
            self._jobs.put(_Job(work, then, future))
        return await future

    def close(self) -> None:
        """Run the jobs that are queued, then end the thread."""
        with self._gate:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _live(self) -> None:
        with self._engine.connect() as connection:
            while (group := self._next_group()) is not None:
                self._commit(connection, group)

    def _next_group(self) -> list[_Job] | None:
        job = self._jobs.get()
        group: list[_Job] = []
        while job is not None:
            if not job.future.cancelled():
                group.append(job)
            if len(group) >= _MAX_GROUP:
                return group
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group
        self._jobs.put(None)  # the end is queued again behind the jobs that came before it
        return group or None

    def _commit(self, connection: Connection, group: list[_Job]) -> None:
        try:
            outcomes = self._transaction(connection, group)
        except Exception as error:  # noqa: BLE001  the thread must survive, other callers wait
            text = f"the ledger could not be written: {error}"
            everything = frozenset(t.metadata.tables)
            outcomes = [_Outcome(job, None, NotWritten(text), everything) for job in group]
        for outcome in outcomes:
            for listener in self.listeners if outcome.written else ():
                listener(outcome.written)
            if outcome.failure is None and outcome.job.then is not None:
                outcome.job.then(outcome.result)
        _resolve(outcomes)

    def _transaction(self, connection: Connection, group: list[_Job]) -> list[_Outcome]:
        """Run jobs in one transaction and return once it is durable."""
        outcomes: list[_Outcome] = []
        database: Any = connection.connection.driver_connection
        counted = False
        database.execute(self._begin)
        try:
            before = database.total_changes
            for job in group:
                outcomes.append(self._run(connection, job, alone=len(group) == 1))
                _check_open(database, outcomes[-1].failure)
            if len(group) == 1 and outcomes[0].failure is not None:
                _roll_back(connection, database)
                return outcomes
            if self._counter is not None and database.total_changes != before:
                self._counter.increment(connection)
                counted = True
            _WRITTEN()
            _commit(connection, database)
        except BaseException:
            _roll_back(connection, database)
            raise
        self.commits += 1
        _COMMITTED()
        if self._counter is not None and counted:
            self._counter.mark_durable()
        return outcomes

    def _run(self, connection: Connection, job: _Job, *, alone: bool) -> _Outcome:
        """Run one job, in a savepoint of its own unless it is alone in its transaction."""
        self._written.clear()
        result: Any = None
        failure: Exception | None = None
        try:
            with contextlib.nullcontext() if alone else _savepoint(connection):
                result = job.work(connection)
        except (DatabaseError, MultipleResultsFound, ValueError, TypeError) as error:
            failure = _damage(error) or error
        except Exception as error:  # noqa: BLE001  raised where the job was queued
            failure = error
        return _Outcome(job, result, failure, frozenset(self._written))

    def _note(self, _connection: Connection, statement: Any, *_: Any) -> None:
        """Note the table that a statement writes to."""
        if isinstance(statement, UpdateBase) and isinstance(statement.table, Table):
            self._written.add(statement.table.name)


def _commit(connection: Connection, database: Any) -> None:
    """Commit a transaction.

    It was begun past SQLAlchemy, which takes longer than a small transaction does. SQLAlchemy joins
    it with the first statement that is executed by way of it, if there is one.
    """
    joined = connection.get_transaction()
    if joined is not None:
        joined.commit()
    else:
        database.commit()


def _roll_back(connection: Connection, database: Any) -> None:
    """Undo a transaction, also one whose commit failed. SQLite may have done so itself."""
    joined = connection.get_transaction()
    if joined is not None:
        joined.rollback()
    if database.in_transaction:
        database.rollback()


def _resolve(outcomes: Sequence[_Outcome]) -> None:
    """Give outcomes to their callers, with one call into each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome.job.future.get_loop(), []).append(outcome)
    for loop, mine in by_loop.items():
        if not loop.is_closed():  # its callers are gone
            loop.call_soon_threadsafe(_resolve_here, mine)


def _resolve_here(outcomes: Sequence[_Outcome]) -> None:
    for outcome in outcomes:
        outcome.resolve()


class _TransactionLost(Exception):
    """The database rolled the whole transaction back."""


def _check_open(database: Any, failure: BaseException | None) -> None:
    """Raise when the whole transaction was rolled back, with the writes of other jobs.

    SQLite may roll back a transaction, not only a statement, on a full disk or an I/O error.
    """
    if failure is not None and not database.in_transaction:
        raise _TransactionLost(f"the transaction was rolled back: {failure}") from failure


@contextlib.contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    database: Any = connection.connection.driver_connection
    database.execute("SAVEPOINT job")
    try:
        yield
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK TO job")
            database.execute("RELEASE job")
        raise
    database.execute("RELEASE job")


def _damage(error: Exception) -> LedgerDamaged | None:
    """Convert the error of a damaged page, schema or cell, or return None for other errors."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, DatabaseError) and code not in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,  # a table or column that our statements need is not there
    ):
        return None
    return LedgerDamaged(f"A page of the ledger is damaged: {error}. {ADVICE}")
