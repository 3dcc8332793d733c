"""Statements: functions of a connection, each one unit of a transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Table,
    and_,
    delete,
    func,
    or_,
    select,
)

from everstep.ledger import sample_rows
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerDamaged
from everstep.ledger.payload_log.content import location_of
from everstep.ledger.records import (
    Backlog,
    Checkpoint,
    Failure,
    Operation,
    OperationRef,
    Run,
    Sampler,
    Session,
)
from everstep.ledger.sqlite import row_checksums

Record = TypeVar("Record", Run, Session, Sampler, Checkpoint)
_ROWS_PER_CHECK = 500


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


def record(kind: type[Record], row: Row[Any]) -> Record:
    """Convert a row to its record."""
    return kind(**{field.name: row._mapping[field.name] for field in fields(kind)})


def operation(values: Mapping[str, Any], *, payload: bool = True) -> Operation:
    """Convert a row of operations to its record and verify its checksum and digests.

    Contents that lie in the payload log are not read: the record says where they lie.

    Args:
        values: the row's values, by column.
        payload: whether to verify the payload as well as the result.

    Raises:
        LedgerDamaged: a checksum or digest does not match.
    """
    damaged = _damaged_part(values, payload)
    if damaged is not None:
        name = values["place"], values["kind"], values["scope"]
        raise damage(damaged, *name, "the database does not hold what was written")
    return unverified_operation(values)


def damage(part: str, seq_id: int, kind: str, scope: str, reason: str) -> LedgerDamaged:
    """Return the error of an operation whose request, result or row is damaged."""
    return LedgerDamaged(
        f"The {part} of operation {seq_id} ({kind}) of {scope} is damaged: {reason}. Restore it "
        "from a backup, or continue from a checkpoint in a new run."
    )


def unverified_operation(values: Mapping[str, Any]) -> Operation:
    """Convert a row of operations to its record as it is: for values that were just written."""
    failed = values["status"] == "failed"
    return Operation(
        request_id=values["request_id"],
        scope=values["scope"],
        seq_id=values["place"],
        kind=values["kind"],
        payload=values["payload"],
        status=values["status"],
        result=values["result"],
        media=values["media"],
        failure=Failure(values["error"], values["category"]) if failed else None,
        accepted_at=values["accepted_at"],
        finished_at=values["finished_at"],
        pruned=bool(values["pruned"]),
        retrieved=bool(values["retrieved"]),
        weights=values["weights"],
        payload_at=location_of(values, "payload"),
        result_at=location_of(values, "result"),
    )


def _damaged_part(row: Mapping[str, Any], payload: bool) -> str | None:
    """Return which part of an operation's row is damaged, or None."""
    if row_checksums.is_damaged(t.operations, row):
        return "record"
    inline = payload and not row["pruned"] and row["payload_size"] is None
    if inline and row["payload_digest"] is not None:
        name = row["request_id"], row["scope"], row["place"], row["kind"]
        if payload_digest(*name, row["payload"]) != row["payload_digest"]:
            return "request"
    if row["result_size"] is not None:
        return None
    ended = row["status"] != "pending" and row["seal"] is not None
    written = row["result_digest"] or (b"" if ended else None)
    if written is not None and written != result_digest(*(row[name] for name in _OUTCOME)):
        return "result"
    return None


_OUTCOME = ("request_id", "status", "result", "media", "error", "category")
"""The columns that the digest of a result covers."""


def payload_digest(request_id: str, scope: str, seq_id: int, kind: str, payload: bytes) -> bytes:
    """Hash an operation's payload together with its identity."""
    return _digest(request_id, scope, str(seq_id), kind, payload)


def result_digest(
    request_id: str,
    status: str,
    result: bytes | None,
    media: str | None,
    error: str | None,
    category: str | None,
) -> bytes:
    """Hash an operation's result or failure together with its request id."""
    return _digest(request_id, status, result, media, error, category)


def _digest(*parts: str | bytes | None) -> bytes:
    content = bytearray()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        length = -1 if encoded is None else len(encoded)
        content += length.to_bytes(8, "little", signed=True)
        content += encoded or b""
    return hashlib.blake2b(content, digest_size=16).digest()


def operation_where(
    connection: Connection, *where: ColumnElement[bool], payload: bool = True
) -> Operation | None:
    """Return the one operation that matches, if any, raising as `operation` does."""
    row = connection.execute(select(t.operations).where(*where)).one_or_none()
    return operation(dict(row._mapping), payload=payload) if row is not None else None


def operations_where(
    connection: Connection,
    *where: ColumnElement[bool],
    limit: int | None = None,
    payload: bool = True,
) -> list[Operation]:
    """Return the operations that match, by scope and seq_id, raising as `operation` does."""
    query = select(t.operations).where(t.operations.c.seq_id.is_not(None), *where)
    ordered = query.order_by(t.operations.c.scope, t.operations.c.seq_id).limit(limit)
    return [operation(dict(row._mapping), payload=payload) for row in connection.execute(ordered)]


def operation_before(connection: Connection, scope: str, seq_id: int) -> OperationRef | None:
    """Return the operation with the greatest sequence id below another, or None if none is."""
    columns = t.operations.c
    query = select(columns.seq_id, columns.kind).where(
        columns.scope == scope, columns.seq_id < seq_id
    )
    row = connection.execute(query.order_by(columns.seq_id.desc()).limit(1)).one_or_none()
    return OperationRef(row.seq_id, row.kind) if row is not None else None


def backlog(connection: Connection) -> list[Backlog]:
    """Return the scopes that have pending operations, the one with the most first."""
    count = func.count().label("waiting")
    columns = t.operations.c
    query = (
        select(columns.scope, func.min(columns.kind).label("kind"), count)
        .where(t.PENDING, columns.seq_id.is_not(None))
        .group_by(columns.scope)
        .order_by(count.desc(), columns.scope)
    )
    return [Backlog(row.scope, row.kind, row.waiting) for row in connection.execute(query)]


def update_run(connection: Connection, run_id: str, **values: Any) -> None:
    """Update columns of a run."""
    row_checksums.update(connection, t.runs, t.runs.c.run_id == run_id, **values)


def one(connection: Connection, kind: type[Record], table: Table, key: str) -> Record | None:
    """Return the record with a primary key, or None if there is none."""
    column = next(iter(table.primary_key.columns))
    row = connection.execute(select(table).where(column == key)).one_or_none()
    if row is None:
        return None
    row_checksums.check(table, row)
    return record(kind, row)


@dataclass(frozen=True)
class Checked:
    """A page of a table that was checked.

    Attributes:
        damaged: a message for each damaged row.
        logged: the intact operations with contents in the payload log, which are not checked.
        last: the last key of the page, or None after the last page.
    """

    damaged: list[str]
    logged: list[Operation]
    last: Any


def check_page(connection: Connection, *, table: Table, after: Any) -> Checked:
    """Check a page of a table."""
    column = next(iter(table.primary_key.columns))
    query = select(table).order_by(column).limit(_ROWS_PER_CHECK)
    rows = connection.execute(query if after is None else query.where(column > after)).all()
    found: list[str] = []
    logged: list[Operation] = []
    for row in rows:
        try:
            if table is t.operations:
                known = operation(dict(row._mapping))
                logged += [known] if known.payload_at or known.result_at else []
            elif table is t.recorded_samples:
                sample_rows.recorded_sample(row)
            else:
                row_checksums.check(table, row)
        except LedgerDamaged as damage:
            found.append(str(damage))
    return Checked(found, logged, rows[-1]._mapping[column.name] if rows else None)


def put(connection: Connection, table: Table, row: Any) -> None:
    """Insert a record, replacing the one with the same primary key."""
    values = asdict(row)
    column = next(iter(table.primary_key.columns))
    connection.execute(delete(table).where(column == values[column.name]))
    row_checksums.insert(connection, table, values)


def delete_checkpoint(connection: Connection, path: str) -> bool:
    """Remove a checkpoint from the index and leave a tombstone."""
    removed = connection.execute(delete(t.checkpoints).where(t.checkpoints.c.path == path))
    if removed.rowcount:
        old_tombstone = delete(t.deleted_checkpoints).where(t.deleted_checkpoints.c.path == path)
        connection.execute(old_tombstone)
        row_checksums.insert(connection, t.deleted_checkpoints, {"path": path, "deleted_at": now()})
    return bool(removed.rowcount)


def unexpired() -> ColumnElement[bool]:
    """Return the condition for checkpoints that clients can see."""
    expires = t.checkpoints.c.expires_at
    return and_(~t.checkpoints.c.quarantined, or_(expires.is_(None), expires > now()))


def checkpoints_where(connection: Connection, *where: ColumnElement[bool]) -> list[Checkpoint]:
    """Return the unexpired checkpoints that match, oldest first."""
    order = (t.checkpoints.c.created_at, t.checkpoints.c.path)
    query = select(t.checkpoints).where(unexpired(), *where).order_by(*order)
    return [
        record(Checkpoint, row)
        for row in row_checksums.intact(t.checkpoints, connection.execute(query))
    ]


def page(
    connection: Connection, table: Table, order: Any, limit: int, offset: int, *where: Any
) -> tuple[list[Row[Any]], int]:
    """Return a page of a table and the total number of rows that match."""
    total = connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()
    query = select(table).where(*where).order_by(*order).limit(limit).offset(offset)
    return list(row_checksums.intact(table, connection.execute(query))), total
