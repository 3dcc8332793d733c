"""How far the ledger has come, kept beside it: acknowledged transactions that are missing are told.

SQLite takes from a log what verifies, up to the first page that doesn't, and says nothing of the
rest: it can't tell what was lost from what was never finished. So the database counts its
transactions, and a small file says how many of them are durable:

    ledger.sqlite            table ``position``: the database's id, and how many were committed
    ledger.sqlite.position   the same as of the last commit that is durable, 32 bytes

The file is written in place after a commit, before anyone is told, and not synced: it survives the
end of the process; after a power cut it may be behind the database, and never before it.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from pathlib import Path

import structlog
from sqlalchemy import Connection, Engine, select, update

from everstep.ledger import tables as t
from everstep.ledger.database import ADVICE, told
from everstep.ledger.errors import LedgerDamaged

_log = structlog.get_logger("everstep.ledger")
_CONTENT = struct.Struct("<16sQ")
_CHECK_BYTES = 8
_SIZE = _CONTENT.size + _CHECK_BYTES


def position_path(database: Path) -> Path:
    """Where the position of a database lies."""
    return database.with_name(database.name + ".position")


def refuse_if_gone(database: Path, *, anew: bool) -> None:
    """Raise `LedgerDamaged` when there is a position, and no database.

    Args:
        database: its path.
        anew: take that as known, and begin with an empty one.
    """
    path = position_path(database)
    if database.exists() or not path.exists():
        return
    if anew:
        path.unlink()
        _sync_directory(path.parent)
        return
    known = _read(path)
    count = f"with {known[1]} acknowledged transactions" if known is not None else "and was here"
    raise LedgerDamaged(f"{database} is gone, {count}. {ADVICE}")


class Position:
    """The position of an open database.

    Args:
        database: its path.
        engine: how it is read.

    Raises:
        LedgerDamaged: the database has less than what was acknowledged, or is another one.
    """

    def __init__(self, database: Path, engine: Engine) -> None:
        path = position_path(database)
        with told(database), engine.begin() as connection:
            row = connection.execute(select(t.position)).one_or_none()
        if row is None or not re.fullmatch("[0-9a-f]{32}", str(row.identity)):
            raise LedgerDamaged(f"{database} does not say how far it is. {ADVICE}")
        self._identity = bytes.fromhex(row.identity)
        self._commits: int = row.commits
        known = _read(path)
        if known is not None and known[0] != self._identity:
            raise LedgerDamaged(
                f"{database} is not the database that was here, which had {known[1]} acknowledged "
                f"transactions. {ADVICE}"
            )
        if known is not None and known[1] > self._commits:
            raise LedgerDamaged(
                f"{database} lacks {known[1] - self._commits} of {known[1]} acknowledged "
                f"transactions: it, or its log {database.name}-wal, was damaged or replaced. "
                f"{ADVICE}"
            )
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self._file, _encode(self._identity, self._commits), 0)
        os.fsync(self._file)
        _sync_directory(path.parent)

    def count(self, connection: Connection) -> None:
        """Count the transaction that a connection is in."""
        connection.execute(update(t.position).values(commits=self._commits + 1))

    def reached(self) -> None:
        """Note that the counted transaction is durable."""
        self._commits += 1
        try:
            os.pwrite(self._file, _encode(self._identity, self._commits), 0)
        except OSError as error:  # it is durable all the same
            _log.warning("the ledger's position can't be written", reason=str(error))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _encode(identity: bytes, commits: int) -> bytes:
    content = _CONTENT.pack(identity, commits)
    return content + hashlib.blake2b(content, digest_size=_CHECK_BYTES).digest()


def _read(path: Path) -> tuple[bytes, int] | None:
    """The database's id and its number of commits; None when there is no file that can be read."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    identity, commits = _CONTENT.unpack_from(data) if len(data) == _SIZE else (b"", 0)
    if len(data) != _SIZE or _encode(identity, commits) != data:
        _log.error(
            "the ledger's position is damaged, so that nothing says whether the ledger is whole; "
            "it begins anew",
            file=str(path),
        )
        return None
    return identity, commits


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
