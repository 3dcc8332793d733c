"""Prepared: statements that are compiled once and then run on the driver's connection.

SQLAlchemy spends ten times as long on a small statement as SQLite does. The statements of every
accepted and finished operation, and of every commit, are run past it. Their SQL and the conversion
of their values stay SQLAlchemy's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Delete,
    Dialect,
    Insert,
    LargeBinary,
    Select,
    Table,
    Update,
    bindparam,
    insert,
    update,
)
from sqlalchemy.exc import DatabaseError, MultipleResultsFound
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

_Convert = Callable[[Any], Any] | None
SET = "set_"
"""The prefix of the parameters of `update_of`, before the names of its columns."""


class Prepared:
    """A statement whose values are given by the names of its `bindparam`.

    Args:
        statement: the statement. A select gets the columns that it returns from ``columns``.
        columns: what each row of the result holds, in order. Empty for a statement without rows.
    """

    def __init__(
        self,
        statement: Select[Any] | Insert | Update | Delete,
        columns: Sequence[Column[Any]] = (),
    ) -> None:
        self._statement = statement
        self._columns = columns
        self._compiled: dict[str, _Compiled] = {}

    def one(self, connection: Connection, **values: Any) -> dict[str, Any] | None:
        """Return the row that the statement finds by column names, or None if it finds none.

        Raises:
            DatabaseError: the database fails or is damaged.
            MultipleResultsFound: it finds several rows.
            ValueError: a cell does not hold a value of its column's type.
        """
        row = self.row(connection, **values)
        return self.record(connection, row) if row is not None else None

    def row(self, connection: Connection, **values: Any) -> Sequence[Any] | None:
        """Return the row that the statement finds as the driver reads it, or None.

        Raises:
            DatabaseError: the database fails or is damaged.
            MultipleResultsFound: it finds several rows.
        """
        compiled = self._of(connection)
        rows = compiled.execute(connection, compiled.parameters(values)).fetchmany(2)
        if len(rows) > 1:
            raise MultipleResultsFound("Multiple rows were found when one or none was required")
        return rows[0] if rows else None

    def record(self, connection: Connection, row: Sequence[Any]) -> dict[str, Any]:
        """Convert a row of `row` to its values by column names.

        Raises:
            ValueError: a cell does not hold a value of its column's type.
        """
        return self._of(connection).record(row)

    def insert(self, connection: Connection, **values: Any) -> Sequence[Any]:
        """Run the insertion of a row and return its cells as the driver reads them.

        Raises:
            DatabaseError: the database fails or is damaged.
        """
        compiled = self._of(connection)
        cells = compiled.parameters(values)
        compiled.execute(connection, cells)
        return cells

    def run(self, connection: Connection, **values: Any) -> int:
        """Run the statement and return the number of rows that it changed.

        Raises:
            DatabaseError: the database fails or is damaged.
        """
        compiled = self._of(connection)
        changed: int = compiled.execute(connection, compiled.parameters(values)).rowcount
        return changed

    def _of(self, connection: Connection) -> _Compiled:
        dialect = connection.dialect
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = _Compiled(self._statement, self._columns, dialect)
            self._compiled[dialect.name] = compiled
        return compiled


class _Compiled:
    """A statement in the SQL of one database."""

    def __init__(
        self,
        statement: Select[Any] | Insert | Update | Delete,
        columns: Sequence[Column[Any]],
        dialect: Dialect,
    ) -> None:
        compiled = statement.compile(dialect=dialect)
        assert isinstance(compiled, SQLCompiler)
        self._sql = str(compiled)
        self._constants = {
            name: value for name, value in compiled.params.items() if value is not None
        }
        self._parameters: list[tuple[str, _Convert]] = [
            (name, _bind_processor(compiled.binds[name].type, dialect))
            for name in compiled.positiontup or ()
        ]
        self._columns: list[tuple[str, _Convert]] = [
            (each.name, _result_processor(each.type, dialect)) for each in columns
        ]

    def parameters(self, values: dict[str, Any]) -> list[Any]:
        given = {**self._constants, **values} if self._constants else values
        return [
            given[name] if convert is None else convert(given[name])
            for name, convert in self._parameters
        ]

    def execute(self, connection: Connection, parameters: Sequence[Any]) -> Any:
        driver: Any = connection.connection.driver_connection
        try:
            return driver.execute(self._sql, parameters)
        except connection.dialect.loaded_dbapi.Error as error:
            raise DatabaseError(self._sql, None, error) from error

    def record(self, row: Sequence[Any]) -> dict[str, Any]:
        return {
            name: value if convert is None else convert(value)
            for (name, convert), value in zip(self._columns, row, strict=True)
        }


def _bind_processor(kind: TypeEngine[Any], dialect: Dialect) -> _Convert:
    """Return what converts a value for the driver. Drivers take bytes as they are."""
    native = kind.dialect_impl(dialect)
    return None if isinstance(native, LargeBinary) else native.bind_processor(dialect)


def _result_processor(kind: TypeEngine[Any], dialect: Dialect) -> _Convert:
    return kind.dialect_impl(dialect).result_processor(dialect, None)


def insert_into(table: Table) -> Prepared:
    """Return the insertion of a row. Its parameters are all columns of the table, by name."""
    return Prepared(insert(table))


def update_of(table: Table, *names: str) -> Prepared:
    """Return the update of some columns of a row.

    Its parameters are the primary key, as ``key``, and the new values, as `SET` and the name.
    """
    (key,) = table.primary_key.columns
    values: dict[Any, Any] = {table.c[name]: bindparam(f"{SET}{name}") for name in names}
    return Prepared(update(table).where(key == bindparam("key")).values(values))
