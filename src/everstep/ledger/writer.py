"""One thread, one connection: every read, write and checkpoint of the database goes through it.

SQLite 3.7.0 to 3.51.2 can lose commits when a WAL checkpoint of one connection races a commit of
another (the WAL-reset bug). There is only one connection here, so there is no race, whichever
build Python carries. It also gives group commit for nothing: what arrives while one commit is
being fsynced is written by the next one, together.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DatabaseError, MultipleResultsFound

from everstep.failpoints import Failpoint
from everstep.ledger.database import ADVICE
from everstep.ledger.errors import LedgerDamaged, LedgerError, NotWritten
from everstep.ledger.position import Position

Result = TypeVar("Result")
_LARGEST_GROUP = 256
_WRITTEN = Failpoint("ledger.commit.written", "a transaction is written, and not committed")
_COMMITTED = Failpoint("ledger.commit.committed", "a transaction is durable, and no one was told")


@dataclass(frozen=True)
class _Job:
    work: Callable[[Connection], Any]
    future: Future[Any]


class Writer:
    """Runs functions on the connection, several in one transaction.

    Args:
        engine: the database.
        position: told of every transaction that is durable; None: nothing is written.

    Attributes:
        commits: how many transactions were committed.
    """

    def __init__(self, engine: Engine, position: Position | None) -> None:
        self.commits = 0
        self._position = position
        self._engine = engine
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._gate = threading.Lock()  # nothing is queued behind the end
        self._thread = threading.Thread(target=self._live, name="ledger", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[Connection], Result]) -> Result:
        """Run a function in a transaction; returns when that is durable.

        Args:
            work: gets the connection; what it raises undoes its own writes and no one else's.

        Raises:
            NotWritten: the commit failed; nothing was written.
        """
        job = _Job(work, Future())
        with self._gate:
            if self._closed:
                raise LedgerError("the ledger is closed")
            self._jobs.put(job)
        result: Result = await asyncio.wrap_future(job.future)
        return result

    def close(self) -> None:
        """Finish what was queued, then end the thread."""
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
            if job.future.set_running_or_notify_cancel():
                group.append(job)
            if len(group) >= _LARGEST_GROUP:
                return group
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group
        self._jobs.put(None)  # the end was seen; what came before it is written first
        return group or None

    def _commit(self, connection: Connection, group: list[_Job]) -> None:
        outcomes: list[tuple[_Job, Any, BaseException | None]] = []
        database: Any = connection.connection.driver_connection
        counted = False
        try:
            with connection.begin():
                before = database.total_changes
                for job in group:
                    outcomes.append(_outcome(connection, job))
                    _check_open(connection, outcomes[-1][2])
                if self._position is not None and database.total_changes != before:
                    self._position.count(connection)
                    counted = True
                _WRITTEN()
            self.commits += 1
            _COMMITTED()
            if self._position is not None and counted:
                self._position.reached()
        except Exception as error:  # noqa: BLE001  the thread must outlive it: others wait
            for job in group:
                job.future.set_exception(NotWritten(f"the ledger could not be written: {error}"))
            return
        for job, result, failure in outcomes:
            if failure is not None:
                job.future.set_exception(failure)
            else:
                job.future.set_result(result)


class _TransactionLost(Exception):
    """The database undid the whole transaction."""


def _check_open(connection: Connection, failure: BaseException | None) -> None:
    """Raise when the transaction is gone, and with it what others of the group wrote.

    SQLite may undo all of a transaction, not only a statement, on a full disk or an I/O error.
    """
    database: Any = connection.connection.driver_connection
    if failure is not None and not database.in_transaction:
        raise _TransactionLost(f"the transaction was undone: {failure}") from failure


def _outcome(connection: Connection, job: _Job) -> tuple[_Job, Any, BaseException | None]:
    """Run one job in a savepoint of its own."""
    try:
        with connection.begin_nested():
            return job, job.work(connection), None
    except (DatabaseError, MultipleResultsFound, ValueError) as error:
        return job, None, _damage(error) or error
    except Exception as error:  # noqa: BLE001  handed to whoever queued the job
        return job, None, error


def _damage(error: Exception) -> LedgerDamaged | None:
    """What was wrong with the database itself: a page, its schema, or what a cell holds."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, DatabaseError) and code not in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,  # a table or column that our statements need is not there
    ):
        return None
    return LedgerDamaged(f"A page of the ledger is damaged: {error}. {ADVICE}")
