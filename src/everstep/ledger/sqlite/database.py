"""Database files: locked, opened with one connection, WAL and synchronous=FULL, and migrated."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, MultipleResultsFound
from sqlalchemy.pool import StaticPool

from everstep.ledger.errors import LedgerDamaged, LedgerError, LedgerLocked, LedgerTooNew

if TYPE_CHECKING:
    from alembic.config import Config

ADVICE = (
    "Restore a backup (everstep restore). To continue without the missing data: move ledger.sqlite "
    "and its -wal away, and rebuild the index from the vault (everstep vault rebuild)."
)
"""The remedy for a damaged database, for error messages."""
_BUSY_TIMEOUT_SECONDS = 5.0
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
        LedgerDamaged: it is not a database, or a damaged one.
        LedgerError: its disk is full or fails.
    """
    engine = create_engine(
        URL.create("sqlite", database=str(path)),  # as text, a `?` or `#` would end the path
        poolclass=StaticPool,
        connect_args={"check_same_thread": False},
    )
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", partial(_begin, "BEGIN IMMEDIATE"))
    try:
        with database_errors(path):
            _migrate(engine, path)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Translate errors of opening a database: its disk fails, or its content is damaged."""
    try:
        yield
    except DatabaseError as error:
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _DISK_ERRORS:
            raise LedgerError(
                f"{path} can't be opened: {error.orig}. Check that its disk has free space, works "
                "and is writable, then start again. Accepted operations are not lost."
            ) from error
        raise LedgerDamaged(f"{path} can't be read: {error.orig}. {ADVICE}") from error
    except (MultipleResultsFound, UnicodeDecodeError) as error:
        raise _unreadable_schema(path, error) from error


def _unreadable_schema(path: Path, error: Exception) -> LedgerDamaged:
    return LedgerDamaged(f"{path} has no readable schema: {error}. {ADVICE}")


def open_read_only(path: Path) -> Engine:
    """Open the SQLite database at a path for reading, also while a service writes it.

    A connection that can't write never runs a WAL checkpoint either, so the service's connection
    stays the only one that does. Nothing is migrated.

    Raises:
        LedgerTooNew: a newer release wrote it.
        LedgerDamaged: it is not a database, or a damaged one.
        LedgerError: it doesn't exist, can't be opened, or has an older schema than this release's.
    """
    if not path.is_file():
        raise LedgerError(f"There is no {path}.")
    engine = create_engine("sqlite://", creator=lambda: _connect(path), poolclass=StaticPool)
    event.listen(engine, "begin", partial(_begin, "BEGIN"))
    try:
        with database_errors(path), engine.begin() as connection:
            current = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        _check_schema(path, current)
    except LedgerError:
        engine.dispose()
        raise
    return engine


def _connect(path: Path) -> sqlite3.Connection:
    """Connect to a database for reading.

    SQLite keeps an index of the write-ahead log in shared memory, a file beside the database. If
    there is none and none can be created, nobody is writing there: the index is built in this
    process, without locks, if there is a log.
    """

    def connect(options: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro{options}",
            uri=True,
            check_same_thread=False,
            isolation_level=None,
            timeout=_BUSY_TIMEOUT_SECONDS,
        )

    connection = connect("")
    try:
        connection.execute("PRAGMA schema_version")
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CANTOPEN:
            raise
        has_log = path.with_name(f"{path.name}-wal").exists()
        connection = connect("&vfs=unix-none" if has_log else "&immutable=1")
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    return connection


def _check_schema(path: Path, current: str | None) -> None:
    """Raise `LedgerError` unless a database has the schema of this release."""
    known = schemas()
    if current is not None and current not in known:
        raise _too_new(path, current)
    if current != known[-1]:
        raise LedgerError(
            f"{path} has schema {current}, this release reads {known[-1]}. Start this release's "
            "service once ('everstep serve'): it migrates an older schema."
        )


def schemas() -> list[str]:
    """Return the schemas that this release knows, oldest first: the names of its migrations."""
    files = (_migrations() / "versions").glob("[0-9]*_*.py")
    return sorted(each.name.partition("_")[0] for each in files)


def _too_new(path: object, current: str) -> LedgerTooNew:
    return LedgerTooNew(
        f"{path} has schema {current}, which this release doesn't know: a newer release of "
        "everstep wrote it. Start that release, or another home."
    )


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, never the driver
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "secure_delete=FAST",  # ON, Debian's default, writes each dropped payload again, as zeros
        "foreign_keys=ON",
        "busy_timeout=5000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(statement: str, connection: Connection) -> None:
    """Begin a transaction, unless `GroupCommit` has begun it past SQLAlchemy."""
    database: Any = connection.connection.driver_connection
    if not database.in_transaction:
        connection.exec_driver_sql(statement)


def _migrate(engine: Engine, path: Path) -> None:
    from alembic import command
    from alembic.runtime.migration import MigrationContext
    from alembic.util import CommandError

    config = _config()
    try:
        with engine.begin() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
            if current is not None and current not in schemas():
                raise _too_new(path, current)
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise _unreadable_schema(path, error) from error


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))  # interpolated
    return config


def _migrations() -> Path:
    return Path(__file__).parents[1] / "migrations"


def wait_unlocked(path: Path, seconds: float) -> bool:
    """Wait until nobody holds a `HomeLock`, and return whether it was free within the time."""
    free = threading.Event()

    def acquire() -> None:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        free.set()

    if not path.exists():
        return True
    threading.Thread(target=acquire, name="wait for a home", daemon=True).start()
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
        with contextlib.suppress(OSError):  # a full disk: the file only names the holder
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Release the lock."""
        os.close(self._file)
