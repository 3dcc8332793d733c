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
        compiled = self._of(connection)
        rows = compiled.execute(connection, values).fetchmany(2)
        if len(rows) > 1:
            raise MultipleResultsFound("Multiple rows were found when one or none was required")
        return compiled.record(rows[0]) if rows else None

    def run(self, connection: Connection, **values: Any) -> int:
        """Run the statement and return the number of rows that it changed.

        Raises:
            DatabaseError: the database fails or is damaged.
        """
        changed: int = self._of(connection).execute(connection, values).rowcount
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
            (name, _native(compiled.binds[name].type, dialect).bind_processor(dialect))
            for name in compiled.positiontup or ()
        ]
        self._columns: list[tuple[str, _Convert]] = [
            (each.name, _native(each.type, dialect).result_processor(dialect, None))
            for each in columns
        ]

    def execute(self, connection: Connection, values: dict[str, Any]) -> Any:
        driver: Any = connection.connection.driver_connection
        given = {**self._constants, **values}
        parameters = [
            given[name] if convert is None else convert(given[name])
            for name, convert in self._parameters
        ]
        try:
            return driver.execute(self._sql, parameters)
        except connection.dialect.loaded_dbapi.Error as error:
            raise DatabaseError(self._sql, None, error) from error

    def record(self, row: Sequence[Any]) -> dict[str, Any]:
        return {
            name: value if convert is None else convert(value)
            for (name, convert), value in zip(self._columns, row, strict=True)
        }


def _native(kind: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    return kind.dialect_impl(dialect)


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
