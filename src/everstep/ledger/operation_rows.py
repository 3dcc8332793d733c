"""Statements on operations: accept, finish and prune, each one unit of a transaction.

Accepting and finishing are the hot path of every step: they run prepared statements, and return
what they wrote without reading it back.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, func, select

from everstep.ledger import queries as q
from everstep.ledger import sample_rows
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerDamaged, LedgerError, SequenceConflict, SessionFinished
from everstep.ledger.payload_log.content import Content, column_names, location_of
from everstep.ledger.records import SAMPLE, Failure, NewOperation, Operation, Run
from everstep.ledger.sqlite import row_checksums
from everstep.ledger.sqlite.prepared import SET, Prepared, insert_into, update_of
from everstep.ledger.sqlite.verified_rows import VerifiedRows
from everstep.spool import as_bytes

NO_PAYLOAD: dict[str, Any] = {
    "payload": b"",
    "pruned": True,
    "payload_segment": None,
    "payload_offset": None,
}
PRUNED_AT_ONCE = 200
_USE_INTERVAL = timedelta(seconds=10)
"""How far the last use of a run in its row may be behind, unless `record_uses` was called."""
_OUTCOME = ("status", "result", "media", "error", "category", "seconds")
_RESULT = column_names("result")
_END = (*_OUTCOME, *_RESULT, "finished_at", "result_digest", "completion", "seal")

_columns = t.operations.c
_INSERT = insert_into(t.operations)
_BY_SEQ_ID = Prepared(
    select(t.operations).where(
        _columns.scope == bindparam("scope"), _columns.seq_id == bindparam("seq_id")
    ),
    list(_columns),
)
_OPERATIONS, _RUNS, _SESSIONS = map(VerifiedRows, (t.operations, t.runs, t.sessions))
_FINISH = update_of(t.operations, *_END)
_FINISH_AND_PRUNE = update_of(t.operations, *_END, *NO_PAYLOAD)
_LAST_COMPLETION = Prepared(
    select(func.max(_columns.completion)).where(
        _columns.scope == bindparam("scope"), _columns.completion.is_not(None)
    ),
    [_columns.completion],
)
_WEIGHTS = Prepared(
    select(t.samplers.c.model_path).where(t.samplers.c.sampler_id == bindparam("sampler_id")),
    [t.samplers.c.model_path],
)
_USE_RUN = update_of(t.runs, "last_request_at", "seal")


def accept(
    connection: Connection,
    new: NewOperation,
    payload: Content,
    run: Run | None,
    *,
    replace_failed: bool,
    match_payload: bool,
    open_session: bool,
) -> tuple[Operation, bool]:
    """Append an operation, or return the one that has its sequence id. See `Ledger.accept`."""
    known = _BY_SEQ_ID.one(connection, scope=new.scope, seq_id=new.seq_id)
    if known is not None:
        accepted = q.operation(known)
        if not (replace_failed and accepted.status == "failed"):
            return _retried(known, accepted, new, payload, match_payload), False
        mine = t.operations.c.request_id == accepted.request_id
        row_checksums.update(connection, t.operations, mine, seq_id=None)
    if open_session and new.session_id is not None:
        _check_open(connection, new.session_id)
    used = _RUNS.read(connection, new.scope)
    if used is not None and used["status"] == "corrupted" and new.failure is None:
        new = replace(new, failure=Failure(used["fault"], "server"))  # marked since its admission
    values = _new_row(connection, new, payload, q.now())
    cells = _INSERT.insert(connection, **values)
    if values["status"] == "pending":
        _OPERATIONS.add(connection, values["request_id"], cells, values)
    if run is not None and new.failure is None:
        row_checksums.insert(connection, t.runs, asdict(run))
    elif used is not None and values["accepted_at"] - used["last_request_at"] > _USE_INTERVAL:
        _use(connection, used, values["accepted_at"])
    if new.failure is None:
        sample_rows.restart_retention(connection, new.uses)
    return _with_payload(q.unverified_operation(values), new), True


def _with_payload(operation: Operation, new: NewOperation) -> Operation:
    """Return an operation with the payload that was sent, unless that is in a spool."""
    sent = new.payload
    if operation.payload is sent or not isinstance(sent, bytes):
        return operation
    return replace(operation, payload=sent)


def _retried(
    row: dict[str, Any],
    known: Operation,
    new: NewOperation,
    payload: Content,
    match_payload: bool,
) -> Operation:
    """Return the operation that a retry gets, whose payload may be dropped since.

    Raises:
        SequenceConflict: it is no retry of this operation.
    """
    if row["payload_size"] is not None:
        same = payload.has_digest(row["payload_digest"])
    elif known.pruned and new.payload:
        name = known.request_id, known.scope, known.seq_id, known.kind
        same = q.payload_digest(*name, as_bytes(new.payload)) == row["payload_digest"]
    else:
        same = known.payload == as_bytes(new.payload)
    if known.kind != new.kind or (match_payload and not same):
        raise SequenceConflict(
            f"seq_id {new.seq_id} of {new.scope} was used before, for a {known.kind} with "
            f"another content. A {new.kind} needs a sequence id of its own."
        )
    return _with_payload(known, new) if same or known.pruned else known


def _check_open(connection: Connection, session_id: str) -> None:
    """Raise `SessionFinished` for a session that has ended."""
    session = _SESSIONS.read(connection, session_id)
    if session is not None and session["finished"] is not None:
        raise SessionFinished(session_id, session["finished"])


def record_uses(connection: Connection, uses: Mapping[str, datetime]) -> None:
    """Record when runs were used last, given by their ids."""
    for run_id, moment in uses.items():
        run = _RUNS.read(connection, run_id)
        if run is not None and moment > run["last_request_at"]:
            _use(connection, run, moment)


def _use(connection: Connection, run: Mapping[str, Any], moment: datetime) -> None:
    """Record when a run was used."""
    seal = row_checksums.checksum({**run, "last_request_at": moment})
    _USE_RUN.run(connection, key=run["run_id"], set_last_request_at=moment, set_seal=seal)


def _new_row(
    connection: Connection, new: NewOperation, payload: Content, moment: datetime
) -> dict[str, Any]:
    """Return the row of a new operation."""
    request_id = _new_id(moment)
    name = request_id, new.scope, new.seq_id, new.kind
    logged = payload.at
    digest = logged.digest if logged is not None else q.payload_digest(*name, as_bytes(new.payload))
    row: dict[str, Any] = {
        **dict.fromkeys(_columns.keys()),
        "request_id": request_id,
        "scope": new.scope,
        "seq_id": new.seq_id,
        "place": new.seq_id,
        "kind": new.kind,
        **payload.columns("payload"),
        "session_id": new.session_id,
        "status": "pending",
        "accepted_at": moment,
        "payload_digest": digest,
        "weights": _weights(connection, new.scope) if new.is_sample else None,
    }
    if new.failure is not None:
        message, category = new.failure.message, new.failure.category
        row |= {"status": "failed", "error": message, "category": category}
        row |= {"finished_at": moment, "completion": _completion(connection, new.kind, new.scope)}
        row["result_digest"] = q.result_digest(request_id, "failed", None, None, message, category)
    row["seal"] = row_checksums.checksum(row)
    return row


def _new_id(moment: datetime) -> str:
    """Return an id that nobody can guess, after those of earlier moments.

    Ids in order fill one page of their index after the other. Random ones touch and split them all.
    """
    return f"{int(moment.timestamp() * 1000):012x}{secrets.token_hex(10)}"


@dataclass(frozen=True)
class Queue:
    """The pending operations of a scope, as an operation finds them that is about to be accepted.

    Attributes:
        known: whether its sequence id is used already.
        bytes: of their payloads in the payload log.
        last: the greatest sequence id of them, or -1.
    """

    known: bool
    bytes: int
    last: int


def queue(connection: Connection, scope: str, seq_id: int) -> Queue:
    """Return the queue of a scope before an operation."""
    mine = select(_columns.request_id).where(_columns.scope == scope, _columns.seq_id == seq_id)
    known = connection.execute(mine).first() is not None
    pending = select(func.sum(_columns.payload_size), func.max(_columns.seq_id)).where(
        _columns.scope == scope, t.PENDING, _columns.seq_id.is_not(None)
    )
    size, last = connection.execute(pending).one()
    return Queue(known, size or 0, last if last is not None else -1)


def _completion(connection: Connection, kind: str, scope: str) -> int | None:
    """Return the number of a completion that is the next one of its scope. Samples have numbers."""
    if kind != SAMPLE:
        return None
    newest = _LAST_COMPLETION.one(connection, scope=scope)
    return ((newest or {}).get("completion") or 0) + 1


def _weights(connection: Connection, sampler_id: str) -> str | None:
    """Return the checkpoint that a sampler samples from now, or None for the base model."""
    sampler = _WEIGHTS.one(connection, sampler_id=sampler_id)
    return sampler["model_path"] if sampler is not None else None


def finish(
    connection: Connection,
    request_id: str,
    *,
    result: Content | None = None,
    prune: bool = False,
    **outcome: Any,
) -> tuple[Operation, bool]:
    """Record an operation's end, unless it has ended already.

    Args:
        connection: of the transaction.
        request_id: the operation.
        result: the value that its future resolves to, if it succeeded.
        prune: drop its payload, because it will not be replayed.
        outcome: its ``status``, ``media``, ``error``, ``category`` and ``seconds``. The absent
            ones are null.

    Returns:
        The operation, and whether it ended with this call. Its ``payload_at`` says where a
        payload lay that was dropped now.

    Raises:
        LedgerDamaged: its row is damaged.
    """
    known = _OPERATIONS.read(connection, request_id)
    if known is None:
        raise LedgerError(f"there is no operation {request_id}")
    if known["status"] != "pending":
        return q.operation(known, payload=False), False
    _OPERATIONS.remove(connection, request_id)
    payload_at = location_of(known, "payload")
    row = {**known, **dict.fromkeys(_OUTCOME), **outcome, **(NO_PAYLOAD if prune else {})}
    row |= result.columns("result") if result is not None else {}
    row["finished_at"] = q.now()
    row["completion"] = _completion(connection, row["kind"], row["scope"])
    if result is not None and result.at is not None:
        row["result_digest"] = result.at.digest
    else:
        digested = (row[name] for name in ("status", "result", "media", "error", "category"))
        row["result_digest"] = q.result_digest(request_id, *digested)
    row["seal"] = row_checksums.checksum(row)
    names = (*_END, *NO_PAYLOAD) if prune else _END
    statement = _FINISH_AND_PRUNE if prune else _FINISH
    statement.run(connection, key=request_id, **{f"{SET}{name}": row[name] for name in names})
    ended = q.unverified_operation(row)
    if prune:
        ended = replace(ended, payload_at=payload_at)
    if result is not None and result.at is not None and isinstance(result.data, bytes):
        ended = replace(ended, result=result.data)
    return ended, True


def prune(
    connection: Connection, scope: str, after: int, upto: int, kinds: set[str]
) -> tuple[int, set[int]]:
    """Drop up to a batch of payloads of operations that have ended.

    Returns:
        How many, and the segments that held some of them.
    """
    columns = t.operations.c
    here = (columns.scope == scope, columns.seq_id > after, columns.seq_id <= upto)
    ended = (columns.status != "pending", columns.kind.in_(kinds), columns.pruned.is_(None))
    query = select(columns.request_id, columns.payload_segment).where(*here, *ended)
    found = connection.execute(query.limit(PRUNED_AT_ONCE)).all()
    for request_id, _ in found:
        with contextlib.suppress(LedgerDamaged):  # a damaged row stays as it is for inspection
            row_checksums.update(
                connection, t.operations, columns.request_id == request_id, **NO_PAYLOAD
            )
    return len(found), {segment for _, segment in found if segment is not None}


def named_segments(connection: Connection, among: Iterable[int] | None = None) -> set[int]:
    """Return the segments of the payload log that operations name.

    Args:
        connection: of the transaction.
        among: look for these only.
    """
    columns = (_columns.payload_segment, _columns.result_segment)
    if among is None:
        queries = [select(each).distinct().where(each.is_not(None)) for each in columns]
        found = {number for query in queries for number in connection.scalars(query)}
        return {each for each in found if isinstance(each, int)}  # a damaged cell has another type
    return {
        number
        for number in among
        for column in columns
        if connection.execute(select(column).where(column == number).limit(1)).first() is not None
    }


def mark_corrupted(connection: Connection, run_id: str, fault: str) -> list[Operation]:
    """Mark a run as corrupted and fail its pending operations.

    Rows that are damaged themselves are skipped: reading their futures raises `LedgerDamaged`.
    """
    with contextlib.suppress(LedgerDamaged):
        q.update_run(connection, run_id, status="corrupted", fault=fault)
    columns = t.operations.c
    here = (columns.scope == run_id, t.PENDING, columns.seq_id.is_not(None))
    waiting = select(columns.request_id).where(*here).order_by(columns.seq_id)
    failed = []
    for request_id in connection.execute(waiting).scalars().all():
        with contextlib.suppress(LedgerDamaged):
            ended, _ = finish(
                connection, request_id, status="failed", error=fault, category="server"
            )
            failed.append(ended)
    return failed
