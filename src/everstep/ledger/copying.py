"""A copy of the database as it was at one moment, also while a service writes it."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import delete, func, select

from everstep.ledger import tables as t
from everstep.ledger.database import open_engine
from everstep.ledger.errors import LedgerError
from everstep.ledger.index import every_checkpoint
from everstep.ledger.records import Checkpoint


def copy_database(source: Path, target: Path) -> None:
    """Copy a database to a new file, whole and durable, in one read transaction.

    What was committed when the copy begins is in it, what is committed later is not.

    Args:
        source: the database; only read.
        target: the copy; it must not exist, and stands alone (no ``-wal`` beside it).

    Raises:
        LedgerError: the source isn't there, can't be read, or is damaged.
    """
    if not source.is_file():
        raise LedgerError(f"There is no {source}.")
    try:
        with (
            contextlib.closing(
                sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
            ) as there,
            contextlib.closing(sqlite3.connect(target)) as here,
        ):
            there.backup(here, pages=-1)
            here.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise LedgerError(f"{source} can't be copied to {target}: {error}") from error
    check_database(target)
    handle = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_database(path: Path) -> None:
    """Raise `LedgerError` unless SQLite finds a database at a path to be whole."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        ) as database:
            found = [row[0] for row in database.execute("PRAGMA integrity_check(5)")]
    except sqlite3.Error as error:
        raise LedgerError(f"{path} is damaged: {error}") from error
    if found != ["ok"]:
        raise LedgerError(f"{path} is damaged: {'; '.join(found)}")


class Copy:
    """A copied database that no one else uses.

    Args:
        path: where it lies; migrated to this release's schema.
    """

    def __init__(self, path: Path) -> None:
        self._engine = open_engine(path)

    def close(self) -> None:
        """Leave one file, whole and in itself durable."""
        with self._engine.connect() as connection:
            database = connection.connection.driver_connection
            assert database is not None
            database.execute("PRAGMA journal_mode=DELETE")
        self._engine.dispose()

    def checkpoints(self) -> list[Checkpoint]:
        """All rows of the index."""
        with self._engine.begin() as connection:
            return every_checkpoint(connection)

    def positions(self) -> dict[str, int]:
        """The last accepted sequence id of each scope."""
        last = func.max(t.operations.c.seq_id)
        query = select(t.operations.c.scope, last).group_by(t.operations.c.scope)
        with self._engine.begin() as connection:
            return {scope: seq for scope, seq in connection.execute(query) if seq is not None}

    def knows(self, request_id: str) -> bool:
        """Whether an operation was accepted."""
        query = select(t.operations.c.scope).where(t.operations.c.request_id == request_id)
        with self._engine.begin() as connection:
            return connection.execute(query).first() is not None

    def last_saves(self, kinds: Mapping[str, str]) -> dict[tuple[str, str, str], int]:
        """The sequence id of the last save that succeeded, by kind, run and name.

        Args:
            kinds: operations that save, with the kind of what they save.
        """
        columns = t.operations.c
        query = select(columns.kind, columns.scope, columns.seq_id, columns.payload).where(
            columns.kind.in_(list(kinds)), columns.status == "succeeded"
        )
        with self._engine.begin() as connection:
            return {
                (kinds[kind], scope, json.loads(payload)["name"]): seq_id
                for kind, scope, seq_id, payload in connection.execute(query.order_by("seq_id"))
            }

    def drop(self, path: str) -> None:
        """Remove a checkpoint from the index."""
        with self._engine.begin() as connection:
            connection.execute(delete(t.checkpoints).where(t.checkpoints.c.path == path))
