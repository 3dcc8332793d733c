"""Seals: a digest of each row, so that one whose page rotted is told and never served.

A seal covers every column that has a value, but for contents that have digests of their own. What
is null or false is left out, so that a column that a later release adds breaks no seal. Rows of
releases before seals have none and pass, until they are changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Connection, Row, Table, insert, select, update

from everstep.ledger.errors import LedgerDamaged

_log = structlog.get_logger("everstep.ledger")
_CONTENTS = frozenset({"payload", "result"})
"""Columns of operations whose digests are columns."""


def seal(values: Mapping[str, Any]) -> bytes:
    """The seal of a row, by the values of its columns."""
    content = {
        name: value
        for name, value in values.items()
        if name != "seal" and name not in _CONTENTS and value is not None and value is not False
    }
    text = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def check(table: Table, row: Row[Any]) -> None:
    """Raise `LedgerDamaged` unless a row is what was written."""
    values = dict(row._mapping)
    if values["seal"] not in (None, seal(values)):
        key = ", ".join(str(values[column.name]) for column in table.primary_key.columns)
        raise LedgerDamaged(
            f"What the ledger holds of {key} ({table.name}) is not what was written. "
            f"{_ADVICE.get(table.name, 'Restore it from a backup (everstep restore).')}"
        )


_ADVICE = {
    "checkpoints": "Make the index anew from the vault: everstep vault rebuild.",
    "runs": "Restore it from a backup (everstep restore), or go on from a checkpoint in a new run.",
}


def intact(table: Table, rows: Iterable[Row[Any]]) -> Iterator[Row[Any]]:
    """The rows that are what was written; the others are named in the log."""
    for row in rows:
        try:
            check(table, row)
        except LedgerDamaged as damage:
            _log.error("a row is damaged and left out", reason=str(damage))
        else:
            yield row


def add(connection: Connection, table: Table, values: Mapping[str, Any]) -> None:
    """Insert a sealed row."""
    connection.execute(insert(table).values(**values, seal=seal(values)))


def change(connection: Connection, table: Table, *where: ColumnElement[bool], **values: Any) -> int:
    """Change the rows that fit, and seal them again.

    Returns:
        How many there were.

    Raises:
        LedgerDamaged: one of them is not what was written.
    """
    rows = connection.execute(select(table).where(*where)).all()
    for row in rows:
        check(table, row)
        whole = {**row._mapping, **values}
        mine = [column == row._mapping[column.name] for column in table.primary_key.columns]
        connection.execute(update(table).where(*mine).values(**values, seal=seal(whole)))
    return len(rows)


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no place in a row")
