"""Opening the database: one connection, WAL, synchronous=FULL, migrated to our schema."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, MultipleResultsFound, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from everstep.ledger.errors import LedgerDamaged, LedgerError, LedgerLocked, LedgerTooNew

ADVICE = (
    "Restore a backup (everstep restore). To go on without what is missing: move ledger.sqlite and "
    "its -wal away, and make the index anew from the vault (everstep vault rebuild)."
)
"""What to do about a database that is damaged as a whole."""
_PATIENCE_SECONDS = 5.0
_DISK_ERRORS = (
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)


def open_engine(path: Path) -> Engine:
    """Open the SQLite database at a path, creating or migrating it.

    Raises:
        LedgerTooNew: a newer release wrote it.
        LedgerDamaged: it is not a database, or not a whole one.
        LedgerError: its disk is full or fails.
    """
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=StaticPool,
        connect_args={"check_same_thread": False},
    )
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    try:
        with told(path):
            _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Say of a database what keeps it from being opened: its disk, or what it holds."""
    try:
        yield
    except DatabaseError as error:
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _DISK_ERRORS:
            raise LedgerError(
                f"{path} can't be opened: {error.orig}. See that its disk has room, answers and "
                "may be written, then start again; what was accepted is still there."
            ) from error
        raise LedgerDamaged(f"{path} can't be read: {error.orig}. {ADVICE}") from error
    except (CommandError, MultipleResultsFound, UnicodeDecodeError) as error:
        raise LedgerDamaged(f"{path} has no schema that can be read: {error}. {ADVICE}") from error


def open_read_only(path: Path) -> Engine:
    """Open the SQLite database at a path to read it, as it is, also while a service writes it.

    A connection that can't write never checkpoints either, so the one of the service stays the
    only one that does.

    Raises:
        LedgerError: it isn't there, or has another schema than this release's.
    """
    if not path.is_file():
        raise LedgerError(f"There is no {path}.")
    engine = create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro",
            uri=True,
            check_same_thread=False,
            isolation_level=None,
            timeout=_PATIENCE_SECONDS,
        ),
        poolclass=StaticPool,
    )
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    try:
        with engine.begin() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        engine.dispose()
        raise LedgerError(f"{path} can't be read: {error}") from error
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if current != head:
        engine.dispose()
        raise LedgerError(
            f"{path} has schema {current}, this release reads {head}. Start the service of this "
            "release once: it migrates an older one."
        )
    return engine


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by us, never behind our back
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=5000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(engine: Engine) -> None:
    config = _config()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise LedgerTooNew(
                f"{engine.url.database} has schema {current}, which this release doesn't "
                "know: a newer release of everstep wrote it. Start that release, or another home."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def wait_unlocked(path: Path, seconds: float) -> bool:
    """Wait until nobody has a `HomeLock`; returns whether that came about in so many seconds."""
    free = threading.Event()

    def take() -> None:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        free.set()

    if not path.exists():
        return True
    threading.Thread(target=take, name="wait for a home", daemon=True).start()
    return free.wait(seconds)


class HomeLock:
    """An exclusive lock on a database, held as long as the process has it open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise LedgerLocked(
                f"{path.parent} is in use by another everstep service (process {owner}). Stop it, "
                "or choose another --home."
            ) from error
        with contextlib.suppress(OSError):  # a full disk; it only says who has the lock
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let another process have the database."""
        os.close(self._file)
