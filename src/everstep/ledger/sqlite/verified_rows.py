"""Verified rows: rows that were verified before, so that an equal row is not verified again.

A row is read each time that it is needed, and compared with the one that was verified. So it may
have been changed since, or damaged, or its change rolled back. Most rows of a step are the same as
in the step before: then nothing is converted and no checksum is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cachetools import LRUCache
from sqlalchemy import Connection, Table, bindparam, select

from everstep.ledger.sqlite import row_checksums
from everstep.ledger.sqlite.prepared import Prepared

_MAX_ROWS = 1024
_CACHE = "everstep.verified"
_Cache = LRUCache[tuple[str, str], tuple[Sequence[Any], Mapping[str, Any]]]


class VerifiedRows:
    """Reads rows of one table by their primary key. What was verified belongs to a connection.

    Args:
        table: the table.
    """

    def __init__(self, table: Table) -> None:
        (key,) = table.primary_key.columns
        self._table = table
        self._select = Prepared(select(table).where(key == bindparam("key")), list(table.columns))

    def read(self, connection: Connection, key: str) -> Mapping[str, Any] | None:
        """Return a row by column names, or None if there is none.

        Raises:
            LedgerDamaged: its checksum does not match.
        """
        row = self._select.row(connection, key=key)
        if row is None:
            return None
        known = _cache(connection).get((self._table.name, key))
        if known is not None and known[0] == row:
            return known[1]
        values = self._select.record(connection, row)
        row_checksums.check_values(self._table, values)
        self.add(connection, key, row, values)
        return values

    def add(
        self, connection: Connection, key: str, row: Sequence[Any], values: Mapping[str, Any]
    ) -> None:
        """Add a row that was verified, or has just been written.

        Args:
            connection: of the transaction.
            key: its primary key.
            row: its values as the driver reads them, in the order of the columns.
            values: its values by column names.
        """
        _cache(connection)[self._table.name, key] = tuple(row), values

    def remove(self, connection: Connection, key: str) -> None:
        """Drop a row that will not be read again."""
        _cache(connection).pop((self._table.name, key), None)


def _cache(connection: Connection) -> _Cache:
    cache: _Cache | None = connection.info.get(_CACHE)
    if cache is None:
        cache = connection.info[_CACHE] = LRUCache(_MAX_ROWS)
    return cache
