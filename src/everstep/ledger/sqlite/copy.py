"""Database copies: a consistent copy of the database, also while a service writes it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import delete, func, select

from everstep.durable_files import sync_file
from everstep.ledger import tables as t
from everstep.ledger.checkpoint_index import all_checkpoints
from everstep.ledger.errors import LedgerError
from everstep.ledger.operation_rows import named_segments
from everstep.ledger.payload_log.segments import segment_path
from everstep.ledger.records import Checkpoint
from everstep.ledger.sqlite.database import open_engine


def copy_database(source: Path, target: Path) -> None:
    """Copy a database to a new file and sync it, in one read transaction.

    The copy holds the transactions that were committed when it began, and no later ones.

    Args:
        source: the database. It is only read.
        target: the file to create. It must not exist. It stands alone, without a ``-wal``.

    Raises:
        LedgerError: the source doesn't exist, can't be read, or is damaged.
    """
    if not source.is_file():
        raise LedgerError(f"There is no {source}.")
    try:
        with (
            contextlib.closing(
                sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)
            ) as original,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            original.backup(copy, pages=-1)
            copy.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise LedgerError(f"{source} can't be copied to {target}: {error}") from error
    check_database(target)
    sync_file(target)


def check_database(path: Path) -> None:
    """Raise `LedgerError` unless SQLite's integrity check passes."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        ) as database:
            found = [row[0] for row in database.execute("PRAGMA integrity_check(5)")]
    except sqlite3.Error as error:
        raise LedgerError(f"{path} is damaged: {error}") from error
    if found != ["ok"]:
        raise LedgerError(f"{path} is damaged: {'; '.join(found)}")


class DatabaseCopy:
    """A copied database that no other process uses.

    Args:
        path: the file. It is migrated to this release's schema.
    """

    def __init__(self, path: Path) -> None:
        self._engine = open_engine(path)

    def close(self) -> None:
        """Close the copy, leaving a single file without a log."""
        with self._engine.connect() as connection:
            database = connection.connection.driver_connection
            assert database is not None
            database.execute("PRAGMA journal_mode=DELETE")
        self._engine.dispose()

    def checkpoints(self) -> list[Checkpoint]:
        """Return all rows of the index."""
        with self._engine.begin() as connection:
            return all_checkpoints(connection)

    def segments(self, database: Path) -> list[Path]:
        """Return the segments of the payload log that its rows name.

        Args:
            database: the database that it is a copy of, beside which they lie.
        """
        with self._engine.begin() as connection:
            identity = connection.execute(select(t.position.c.identity)).scalar_one()
            named = sorted(named_segments(connection))
        return [segment_path(database, identity, number) for number in named]

    def last_seq_ids(self) -> dict[str, int]:
        """Return the last accepted sequence id of each scope."""
        last = func.max(t.operations.c.seq_id)
        query = select(t.operations.c.scope, last).group_by(t.operations.c.scope)
        with self._engine.begin() as connection:
            return {scope: seq for scope, seq in connection.execute(query) if seq is not None}

    def has_operation(self, request_id: str) -> bool:
        """Return whether an operation was accepted."""
        query = select(t.operations.c.scope).where(t.operations.c.request_id == request_id)
        with self._engine.begin() as connection:
            return connection.execute(query).first() is not None

    def last_saves(self, kinds: Mapping[str, str]) -> dict[tuple[str, str, str], int]:
        """Return the sequence id of the last successful save, by kind, run and name.

        Args:
            kinds: the kind of checkpoint that each kind of operation saves.
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

    def delete_checkpoint(self, path: str) -> None:
        """Remove a checkpoint from the index."""
        with self._engine.begin() as connection:
            connection.execute(delete(t.checkpoints).where(t.checkpoints.c.path == path))
