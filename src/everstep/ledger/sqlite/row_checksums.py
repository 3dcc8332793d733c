"""Row checksums: detect rows whose page was damaged, so that they are reported and never served.

The column ``seal`` holds the checksum. It covers every column that has a value, except large
contents (payloads, results, recorded samples), which have digests of their own. Null and false are
left out, so that a column added by a later release changes no checksum. Rows that were written
before checksums existed have none and pass until they are changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, Table, select

from everstep.ledger.errors import LedgerDamaged
from everstep.logs import get_logger

_log = get_logger("everstep.ledger")
_CONTENTS = frozenset({"payload", "result", "prompt", "sequences"})
"""Columns whose contents have digest columns of their own."""


def checksum(values: Mapping[str, Any]) -> bytes:
    """Return the checksum of a row from the values of its columns."""
    content = {
        name: value
        for name, value in values.items()
        if name != "seal" and name not in _CONTENTS and value is not None and value is not False
    }
    return hashlib.blake2b(_ENCODER.encode(content).encode(), digest_size=16).digest()


def check(table: Table, row: Row[Any]) -> None:
    """Raise `LedgerDamaged` if a row is damaged."""
    check_values(table, dict(row._mapping))


@cache
def _needed(table: Table) -> tuple[str, ...]:
    return tuple(each.name for each in table.columns if not each.nullable)


def check_values(table: Table, values: Mapping[str, Any]) -> None:
    """Raise `LedgerDamaged` if a row is damaged, given its values by column."""
    if is_damaged(table, values):
        key = ", ".join(str(values[column.name]) for column in table.primary_key.columns)
        raise LedgerDamaged(
            f"The ledger's row of {key} ({table.name}) is damaged: its checksum does not match. "
            f"{_ADVICE.get(table.name, 'Restore it from a backup (everstep restore).')}"
        )


def is_damaged(table: Table, values: Mapping[str, Any]) -> bool:
    """Return whether a row is damaged, given its values by column.

    Its checksum does not match, or it lacks a value that the table requires. A row of another
    table's page lacks such values.
    """
    lacks = any(name in values and values[name] is None for name in _needed(table))
    return lacks or values["seal"] not in (None, checksum(values))


_ADVICE = {
    "checkpoints": "Rebuild the index from the vault: everstep vault rebuild.",
    "runs": "Restore it from a backup (everstep restore), or continue from a checkpoint in a new "
    "run.",
}


def intact(table: Table, rows: Iterable[Row[Any]]) -> Iterator[Row[Any]]:
    """Yield the rows whose checksums match, log the others and skip them."""
    for row in rows:
        try:
            check(table, row)
        except LedgerDamaged as damage:
            _log.error("damaged row skipped", reason=str(damage))
        else:
            yield row


def insert(connection: Connection, table: Table, values: Mapping[str, Any]) -> None:
    """Insert a row with its checksum."""
    connection.execute(table.insert().values(**values, seal=checksum(values)))


def update(connection: Connection, table: Table, *where: ColumnElement[bool], **values: Any) -> int:
    """Change the rows that match, and their checksums.

    Returns:
        The number of rows that matched.

    Raises:
        LedgerDamaged: the checksum of one of them does not match.
    """
    return _update(connection, table, select(table).where(*where), values)


def touch(connection: Connection, table: Table, *where: ColumnElement[bool], **values: Any) -> int:
    """Change the rows that match as `update` does, without reading their large contents."""
    return _update(connection, table, without_contents(table).where(*where), values)


def without_contents(table: Table) -> Select[Any]:
    """Return the query of all columns but the large contents. `check` takes its rows."""
    return select(*(each for each in table.columns if each.name not in _CONTENTS))


def _update(
    connection: Connection, table: Table, query: Select[Any], values: Mapping[str, Any]
) -> int:
    rows = connection.execute(query).all()
    for row in rows:
        check(table, row)
        whole = {**row._mapping, **values}
        mine = [column == row._mapping[column.name] for column in table.primary_key.columns]
        connection.execute(table.update().where(*mine).values(**values, seal=checksum(whole)))
    return len(rows)


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"a row can't hold a {type(value).__name__}")


_ENCODER = json.JSONEncoder(sort_keys=True, default=_plain)
