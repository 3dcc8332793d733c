"""Commit counter: detects the loss of acknowledged transactions when the ledger is opened.

SQLite replays its log up to the first page that doesn't verify and ignores the rest silently: it
can't distinguish lost transactions from unfinished ones. So the database counts its transactions,
and a small file holds the number of the durable ones:

    ledger.sqlite            table ``position``: the database's id and its number of commits
    ledger.sqlite.position   the same as of the last durable commit, 32 bytes

The file is written in place after a commit, before the commit is acknowledged, and not synced. It
survives the end of the process. After a power cut it may be behind the database, never ahead of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path

from sqlalchemy import Connection, Engine, bindparam, select, update

from everstep.durable_files import sync_directory
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerDamaged
from everstep.ledger.sqlite.database import ADVICE, database_errors
from everstep.ledger.sqlite.prepared import Prepared
from everstep.logs import get_logger

_log = get_logger("everstep.ledger")
_CONTENT = struct.Struct("<16sQ")
_CHECK_BYTES = 8
_SIZE = _CONTENT.size + _CHECK_BYTES
_COUNT = Prepared(update(t.position).values({t.position.c.commits: bindparam("durable")}))


def counter_path(database: Path) -> Path:
    """Return the path of a database's commit counter."""
    return database.with_name(database.name + ".position")


def check_not_missing(database: Path, *, allow_missing: bool) -> None:
    """Raise `LedgerDamaged` when there is a commit counter and no database.

    Args:
        database: the path of the database.
        allow_missing: remove the counter instead, so that an empty database can be created.
    """
    path = counter_path(database)
    if database.exists() or not path.exists():
        return
    if allow_missing:
        path.unlink()
        sync_directory(path.parent)
        return
    known = _read(path)
    count = f"with {known[1]} acknowledged transactions" if known is not None else "and was here"
    raise LedgerDamaged(f"{database} is gone, {count}. {ADVICE}")


def check_complete(database: Path, engine: Engine) -> tuple[bytes, int]:
    """Return an open database's id and number of commits.

    Args:
        database: the path of the database. A service may be writing it.
        engine: the open database.

    Raises:
        LedgerDamaged: the database lacks acknowledged transactions, or is another one.
    """
    known = _read(counter_path(database))  # before the database: a commit may come in between
    with database_errors(database), engine.begin() as connection:
        row = connection.execute(select(t.position)).one_or_none()
    sound = row is not None and isinstance(row.commits, int)
    if row is None or not sound or not re.fullmatch("[0-9a-f]{32}", str(row.identity)):
        raise LedgerDamaged(f"{database} holds no commit counter. {ADVICE}")
    identity, commits = bytes.fromhex(row.identity), row.commits
    if known is not None and known[0] != identity:
        raise LedgerDamaged(
            f"{database} is not the database that was here, which had {known[1]} acknowledged "
            f"transactions. {ADVICE}"
        )
    if known is not None and known[1] > commits:
        raise LedgerDamaged(
            f"{database} lacks {known[1] - commits} of {known[1]} acknowledged transactions: it, "
            f"or its log {database.name}-wal, was damaged or replaced. {ADVICE}"
        )
    return identity, commits


class CommitCounter:
    """The commit counter of an open database.

    Args:
        database: the path of the database.
        engine: the open database.

    Raises:
        LedgerDamaged: the database lacks acknowledged transactions, or is another one.
    """

    def __init__(self, database: Path, engine: Engine) -> None:
        path = counter_path(database)
        self._identity, self._commits = check_complete(database, engine)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self._file, _encode(self._identity, self._commits), 0)
        os.fsync(self._file)
        sync_directory(path.parent)

    @property
    def identity(self) -> str:
        """The database's id."""
        return self._identity.hex()

    def increment(self, connection: Connection) -> None:
        """Count the transaction that a connection is in, as a part of it."""
        _COUNT.run(connection, durable=self._commits + 1)

    def mark_durable(self) -> None:
        """Record in the file that the counted transaction is durable."""
        self._commits += 1
        try:
            os.pwrite(self._file, _encode(self._identity, self._commits), 0)
        except OSError as error:  # the transaction is durable all the same
            _log.warning("commit counter could not be written", reason=str(error))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _encode(identity: bytes, commits: int) -> bytes:
    content = _CONTENT.pack(identity, commits)
    return content + hashlib.blake2b(content, digest_size=_CHECK_BYTES).digest()


def _read(path: Path) -> tuple[bytes, int] | None:
    """Read the database's id and number of commits, or None if there is no valid file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    identity, commits = _CONTENT.unpack_from(data) if len(data) == _SIZE else (b"", 0)
    if len(data) != _SIZE or _encode(identity, commits) != data:
        _log.error(
            "commit counter is damaged and restarts; lost transactions can't be detected this time",
            file=str(path),
        )
        return None
    return identity, commits
