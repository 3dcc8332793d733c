"""Store: the seam between the ledger's statements and the database that runs them.

A statement is a plain function of a SQLAlchemy connection. A store owns the engine and decides how
statements share transactions, what makes a commit durable, and how two processes are kept from
writing the same ledger. `everstep.ledger.sqlite` is the store of one process and one file.

A store that several processes write will also have to fence writers by lease epoch and to announce
other processes' commits. A SQLite store needs neither: its lock admits one process at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy import Connection

from everstep.ledger.payload_log.log import PayloadLog

Result = TypeVar("Result")


class Store(Protocol):
    """A transactional database that runs statements, with a payload log beside it."""

    @property
    def commits(self) -> int:
        """The number of transactions that this store has committed since it was opened."""

    @property
    def payloads(self) -> PayloadLog:
        """Where large requests and results lie. The store opens and closes it."""

    def listen(self, written: Callable[[frozenset[str]], None]) -> None:
        """Have a function called for each call that wrote to tables, with their names.

        That is once the writes are durable, in the order of the calls, and before the call
        returns and its ``then`` is called. Writes of a `Prepared` statement are left out: whoever
        runs one notifies others with ``then``.

        Args:
            written: is called in the store's thread. It must neither raise nor block.
        """

    async def run(
        self,
        work: Callable[[Connection], Result],
        then: Callable[[Result], None] | None = None,
    ) -> Result:
        """Run a function in a transaction and return its result once that is durable.

        Calls that arrive together may share one transaction and one fsync. Each runs in a
        savepoint of its own: an exception undoes that call's writes and no other's. Calls run in
        the order in which they were queued, and each sees the writes of those before it. A call
        whose task is cancelled before it starts does not run. One that has started runs to its
        end, and its writes may be committed.

        Args:
            work: gets the connection. It must not commit, roll back or keep the connection.
            then: gets the result once that is durable, in the order of the calls and before `run`
                returns, also where the caller was cancelled by then. It is called in the store's
                thread, and must neither raise nor block.

        Raises:
            NotWritten: the commit failed, so nothing of the transaction was written.
            LedgerDamaged: the database itself is damaged.
            LedgerError: the store is closed.
        """

    async def read(
        self,
        work: Callable[[Connection], Result],
        then: Callable[[Result], None] | None = None,
    ) -> Result:
        """Run a function that writes nothing. It sees every write that `run` has returned for.

        Args:
            work: gets the connection.
            then: as of `run`.

        Raises:
            LedgerDamaged: the database itself is damaged.
            LedgerError: the store is closed.
        """

    async def backup(self, target: Path) -> None:
        """Copy everything that is committed to a new, durable database that stands alone.

        Commits go on while the copy is made. It holds those that were made before it began and
        none that were made after.

        Args:
            target: the file to create. It must not exist.

        Raises:
            LedgerError: the database can't be read or is damaged.
        """

    async def check(self) -> None:
        """Check the structure of the database. Row checksums are the ledger's own affair.

        Raises:
            LedgerError: the database is damaged.
        """

    async def close(self) -> None:
        """Run the calls that are queued, then release the database."""
