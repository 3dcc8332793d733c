"""The statements: plain functions of a connection, each one unit of a transaction."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from dataclasses import asdict, fields, replace
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

from everstep.ledger import seals
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerDamaged, LedgerError, SequenceConflict
from everstep.ledger.records import (
    Backlog,
    Checkpoint,
    Failure,
    NewOperation,
    Operation,
    Run,
    Sampler,
    Session,
)

Record = TypeVar("Record", Run, Session, Sampler, Checkpoint)
NO_PAYLOAD: dict[str, Any] = {"payload": b"", "pruned": True}
PRUNED_AT_ONCE = 200
_LOOKED_AT_ONCE = 500


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def record(kind: type[Record], row: Row[Any]) -> Record:
    """A row as its record."""
    return kind(**{field.name: row._mapping[field.name] for field in fields(kind)})


def operation(row: Row[Any], *, payload: bool = True) -> Operation:
    """A row of operations as its record.

    Args:
        row: the row.
        payload: whether what it asks is of interest, and not its result alone.

    Raises:
        LedgerDamaged: what is of interest is not what was written.
    """
    asked = payload_digest(row.request_id, row.scope, row.place, row.kind, row.payload)
    gave = result_digest(row.request_id, row.status, row.result, row.media, row.error, row.category)
    ended = row.status != "pending" and row.seal is not None
    for part, found, written in (
        ("record", seals.seal(dict(row._mapping)), row.seal),
        ("request", asked, row.payload_digest if payload and not row.pruned else None),
        ("result", gave, row.result_digest or (b"" if ended else None)),
    ):
        if written not in (None, found):
            raise LedgerDamaged(
                f"The {part} of operation {row.place} ({row.kind}) of {row.scope} is damaged: the "
                "database does not hold what was written. Restore it from a backup, or go on from "
                "a checkpoint in a new run."
            )
    failure = Failure(row.error, row.category) if row.status == "failed" else None
    return Operation(
        request_id=row.request_id,
        scope=row.scope,
        seq_id=row.place,
        kind=row.kind,
        payload=row.payload,
        status=row.status,
        result=row.result,
        media=row.media,
        failure=failure,
        accepted_at=row.accepted_at,
        finished_at=row.finished_at,
        pruned=bool(row.pruned),
        retrieved=bool(row.retrieved),
        weights=row.weights,
    )


def payload_digest(request_id: str, scope: str, place: int, kind: str, payload: bytes) -> bytes:
    """Digest of what an operation asks."""
    return _digest(request_id, scope, str(place), kind, payload)


def result_digest(
    request_id: str,
    status: str,
    result: bytes | None,
    media: str | None,
    error: str | None,
    category: str | None,
) -> bytes:
    """Digest of what an operation gave."""
    return _digest(request_id, status, result, media, error, category)


def _digest(*parts: str | bytes | None) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        length = -1 if content is None else len(content)
        digest.update(length.to_bytes(8, "little", signed=True))
        digest.update(content or b"")
    return digest.digest()


def operation_where(
    connection: Connection, *where: ColumnElement[bool], payload: bool = True
) -> Operation | None:
    """The one operation that fits, if any; raises as `operation` does."""
    row = connection.execute(select(t.operations).where(*where)).one_or_none()
    return operation(row, payload=payload) if row is not None else None


def operations_where(
    connection: Connection,
    *where: ColumnElement[bool],
    limit: int | None = None,
    payload: bool = True,
) -> list[Operation]:
    """The operations that fit, by scope and sequence id; raises as `operation` does."""
    query = select(t.operations).where(t.operations.c.seq_id.is_not(None), *where)
    ordered = query.order_by(t.operations.c.scope, t.operations.c.seq_id).limit(limit)
    return [operation(row, payload=payload) for row in connection.execute(ordered)]


def backlog(connection: Connection) -> list[Backlog]:
    """Scopes with pending operations, the one with the most first."""
    count = func.count().label("waiting")
    columns = t.operations.c
    query = (
        select(columns.scope, func.min(columns.kind).label("kind"), count)
        .where(columns.status == "pending", columns.seq_id.is_not(None))
        .group_by(columns.scope)
        .order_by(count.desc(), columns.scope)
    )
    return [Backlog(row.scope, row.kind, row.waiting) for row in connection.execute(query)]


def update_run(connection: Connection, run_id: str, **values: Any) -> None:
    """Change columns of a run."""
    seals.change(connection, t.runs, t.runs.c.run_id == run_id, **values)


def one(connection: Connection, kind: type[Record], table: Table, key: str) -> Record | None:
    """The record with this primary key, if any."""
    column = next(iter(table.primary_key.columns))
    row = connection.execute(select(table).where(column == key)).one_or_none()
    if row is None:
        return None
    seals.check(table, row)
    return record(kind, row)


def accept(
    connection: Connection, new: NewOperation, run: Run | None, replace_failed: bool, match: bool
) -> tuple[Operation, bool]:
    """Append an operation, or find the one that has its place."""
    here = (t.operations.c.scope == new.scope, t.operations.c.seq_id == new.seq_id)
    known = operation_where(connection, *here)
    if known is not None and not (replace_failed and known.status == "failed"):
        if known.kind != new.kind or (match and not _asks(connection, known, new.payload)):
            raise SequenceConflict(
                f"seq_id {new.seq_id} of {new.scope} was used before, for a {known.kind} with "
                f"another content; a {new.kind} needs a sequence id of its own."
            )
        return (replace(known, payload=new.payload) if known.pruned else known), False
    if known is not None:
        mine = t.operations.c.request_id == known.request_id
        seals.change(connection, t.operations, mine, seq_id=None)
    moment = now()
    request_id = uuid.uuid4().hex
    failed = new.failure is not None
    values = {
        "request_id": request_id,
        "scope": new.scope,
        "seq_id": new.seq_id,
        "place": new.seq_id,
        "kind": new.kind,
        "payload": new.payload,
        "session_id": new.session_id,
        "status": "failed" if failed else "pending",
        "error": new.failure.message if new.failure else None,
        "category": new.failure.category if new.failure else None,
        "accepted_at": moment,
        "finished_at": moment if failed else None,
        "payload_digest": payload_digest(request_id, new.scope, new.seq_id, new.kind, new.payload),
        "result_digest": result_digest(
            request_id, "failed", None, None, new.failure.message, new.failure.category
        )
        if new.failure
        else None,
        "completion": _next_completion(connection, new.scope) if failed else None,
        "weights": _weights(connection, new.scope) if new.samples else None,
    }
    seals.add(connection, t.operations, values)
    if run is not None and not failed:
        seals.add(connection, t.runs, asdict(run))
    else:
        update_run(connection, new.scope, last_request_at=moment)
    accepted = operation_where(connection, t.operations.c.request_id == request_id)
    if accepted is None:
        raise LedgerError(f"operation {request_id} was not written")
    return accepted, True


def _asks(connection: Connection, known: Operation, payload: bytes) -> bool:
    """Whether an operation, be its payload dropped, was accepted with this payload."""
    if known.payload == payload:
        return True
    query = select(t.operations).where(t.operations.c.request_id == known.request_id)
    row = connection.execute(query).one()
    asked = payload_digest(row.request_id, row.scope, row.place, row.kind, payload)
    return bool(row.pruned) and asked == row.payload_digest


def _next_completion(connection: Connection, scope: str) -> int:
    """The number of the next end in a scope."""
    newest = select(func.max(t.operations.c.completion)).where(t.operations.c.scope == scope)
    return (connection.execute(newest).scalar_one() or 0) + 1


def _weights(connection: Connection, sampler_id: str) -> str | None:
    """The path of what a sampler samples from now; None: the base model."""
    mine = t.samplers.c.sampler_id == sampler_id
    return connection.execute(select(t.samplers.c.model_path).where(mine)).scalar_one_or_none()


def finish(connection: Connection, request_id: str, **values: Any) -> tuple[Operation, bool]:
    """Record an operation's end; returns it and whether it ended now: the first end counts."""
    mine = t.operations.c.request_id == request_id
    pending = t.operations.c.status == "pending"
    gave = (values.get(name) for name in ("result", "media", "error", "category"))
    digest = result_digest(request_id, values["status"], *gave)
    more = {"finished_at": now(), "result_digest": digest, **values}
    scope = connection.execute(select(t.operations.c.scope).where(mine, pending)).scalar()
    if scope is not None:
        more["completion"] = _next_completion(connection, scope)
    ended = seals.change(connection, t.operations, mine, pending, **more)
    finished = operation_where(connection, mine, payload=False)
    if finished is None:
        raise LedgerError(f"there is no operation {request_id}")
    return finished, ended == 1


def prune(connection: Connection, scope: str, after: int, upto: int, kinds: set[str]) -> int:
    """Drop some payloads of operations that have ended; returns of how many."""
    columns = t.operations.c
    here = (columns.scope == scope, columns.seq_id > after, columns.seq_id <= upto)
    ended = (columns.status != "pending", columns.kind.in_(kinds), columns.pruned.is_(None))
    query = select(columns.request_id).where(*here, *ended).limit(PRUNED_AT_ONCE)
    found = list(connection.execute(query).scalars())
    for request_id in found:
        with contextlib.suppress(LedgerDamaged):  # it stays as it is, for whoever looks at it
            seals.change(connection, t.operations, columns.request_id == request_id, **NO_PAYLOAD)
    return len(found)


def damaged(connection: Connection, *, table: Table, after: Any) -> tuple[list[str], Any]:
    """What is damaged in a page of a table, and the page's last key; None: there are no more."""
    column = next(iter(table.primary_key.columns))
    query = select(table).order_by(column).limit(_LOOKED_AT_ONCE)
    rows = connection.execute(query if after is None else query.where(column > after)).all()
    found = []
    for row in rows:
        try:
            if table is t.operations:
                operation(row)
            else:
                seals.check(table, row)
        except LedgerDamaged as damage:
            found.append(str(damage))
    return found, rows[-1]._mapping[column.name] if rows else None


def corrupt(connection: Connection, run_id: str, fault: str) -> list[Operation]:
    """Mark a run, fail what waits on it; of what is damaged itself the futures say so."""
    with contextlib.suppress(LedgerDamaged):
        update_run(connection, run_id, status="corrupted", fault=fault)
    columns = t.operations.c
    here = (columns.scope == run_id, columns.status == "pending", columns.seq_id.is_not(None))
    waiting = select(columns.request_id).where(*here).order_by(columns.seq_id)
    failed = []
    for request_id in connection.execute(waiting).scalars().all():
        with contextlib.suppress(LedgerDamaged):
            values = {"status": "failed", "error": fault, "category": "server"}
            failed.append(finish(connection, request_id, **values)[0])
    return failed


def put(connection: Connection, table: Table, row: Any) -> None:
    """Insert a record, replacing the one with its primary key."""
    values = asdict(row)
    column = next(iter(table.primary_key.columns))
    connection.execute(delete(table).where(column == values[column.name]))
    seals.add(connection, table, values)


def delete_checkpoint(connection: Connection, path: str) -> bool:
    """Remove a checkpoint from the index, and remember that."""
    removed = connection.execute(delete(t.checkpoints).where(t.checkpoints.c.path == path))
    if removed.rowcount:
        forget = delete(t.deleted_checkpoints).where(t.deleted_checkpoints.c.path == path)
        connection.execute(forget)
        seals.add(connection, t.deleted_checkpoints, {"path": path, "deleted_at": now()})
    return bool(removed.rowcount)


def unexpired() -> ColumnElement[bool]:
    """Checkpoints that exist for clients."""
    expires = t.checkpoints.c.expires_at
    return and_(~t.checkpoints.c.quarantined, or_(expires.is_(None), expires > now()))


def checkpoints_where(connection: Connection, *where: ColumnElement[bool]) -> list[Checkpoint]:
    """Unexpired checkpoints that fit, oldest first."""
    order = (t.checkpoints.c.created_at, t.checkpoints.c.path)
    query = select(t.checkpoints).where(unexpired(), *where).order_by(*order)
    return [
        record(Checkpoint, row) for row in seals.intact(t.checkpoints, connection.execute(query))
    ]


def page(
    connection: Connection, table: Table, order: Any, limit: int, offset: int, *where: Any
) -> tuple[list[Row[Any]], int]:
    """A page of a table and how many rows there are."""
    total = connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()
    query = select(table).where(*where).order_by(*order).limit(limit).offset(offset)
    return list(seals.intact(table, connection.execute(query))), total
