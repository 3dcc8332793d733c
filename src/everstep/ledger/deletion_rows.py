"""Statements on what a run or session owns. The caller runs them in a transaction.

A run owns its own scope, and those that begin with its id and a colon or a slash: the scopes of its
samplers and of its unload operations. In the same way a session owns the scopes of its runs,
samplers and custom losses. A run also owns samplers of other sessions that sample from its
checkpoints.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, or_, select

from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.records import (
    RUN,
    SAMPLER,
    SESSION,
    Checkpoint,
    Owned,
    Reader,
    Tombstone,
)
from everstep.ledger.sqlite import row_checksums
from everstep.wire.errors import WireError
from everstep.wire.paths import SCHEME, parse_path

REMOVED_AT_ONCE = 200
_IDS_AT_ONCE = 200


@dataclass(frozen=True)
class User:
    """An open session that uses a run or session which is to be deleted.

    Attributes:
        heard_at: when its client was heard of last.
        pending: how many of the operations that would be deleted have not ended.
    """

    session_id: str
    heard_at: datetime
    pending: int


def names(key: str) -> list[str]:
    """Return an id or a checkpoint's path, and the ids of all that may own it."""
    path = key.removeprefix(SCHEME)
    return [key] + [path[:end] for end in range(len(path) - 1, 0, -1) if path[end] in ":/"]


def buries(tombstone: Tombstone, key: str) -> bool:
    """Return whether a tombstone covers a key. The tombstone's id is among the key's `names`."""
    return tombstone.id == key or tombstone.kind != SAMPLER


def tombstone_of(connection: Connection, key: str) -> Tombstone | None:
    """Return the tombstone of a run, session, sampler, scope or path, or of what owned it."""
    query = select(t.tombstones).where(t.tombstones.c.id.in_(names(key)))
    found = [_tombstone(row) for row in connection.execute(query)]
    mine = [each for each in found if buries(each, key)]
    return max(mine, key=lambda each: len(each.id), default=None)


def unfinished(connection: Connection) -> list[Tombstone]:
    """Return the tombstones of deletions that are not finished, by id."""
    query = select(t.tombstones).where(t.tombstones.c.unfinished).order_by(t.tombstones.c.id)
    return [_tombstone(row) for row in connection.execute(query)]


def owned(connection: Connection, kind: str, key: str) -> Owned | None:
    """Return what a run or session owns, or None if there is none of that id."""
    table, column = (
        (t.runs, t.runs.c.run_id) if kind == RUN else (t.sessions, t.sessions.c.session_id)
    )
    if connection.execute(select(column).where(column == key).select_from(table)).first() is None:
        return None
    runs = [key]
    if kind == SESSION:
        mine = select(t.runs.c.run_id).where(t.runs.c.session_id == key)
        runs = list(connection.scalars(mine.order_by(t.runs.c.created_at, t.runs.c.run_id)))
    samplers = _samplers(connection, kind, key, runs)
    counts = _operations(connection, [key, *runs], samplers)
    return Owned(
        id=key,
        kind=kind,
        runs=runs,
        samplers=samplers,
        checkpoints=list(_checkpoints(connection, runs)),
        operations=sum(counts.values()),
        pending=sum(count for (_, status), count in counts.items() if status == "pending"),
    )


def users(connection: Connection, what: Owned, since: datetime) -> list[User]:
    """Return the open sessions that use a run or session.

    Args:
        connection: the connection.
        what: the run or session.
        since: a session uses it if its client was heard of since then, or if unfinished operations
            of the session would be deleted.
    """
    heard: dict[str, datetime] = {}
    scopes: dict[str, str] = {}

    def note(session_id: str, scope: str, moment: datetime) -> None:
        scopes[scope] = session_id
        heard[session_id] = max(moment, heard.get(session_id, moment))

    if what.kind == SESSION:
        scopes[what.id] = what.id
    for part in _parts(what.runs):
        runs = select(t.runs.c.run_id, t.runs.c.session_id, t.runs.c.last_request_at)
        for run_id, session_id, moment in connection.execute(runs.where(t.runs.c.run_id.in_(part))):
            note(session_id, run_id, moment)
    columns = t.samplers.c
    for part in _parts(what.samplers):
        samplers = select(columns.sampler_id, columns.session_id, columns.created_at)
        for sampler_id, session_id, moment in connection.execute(
            samplers.where(columns.sampler_id.in_(part))
        ):
            note(session_id, sampler_id, _last_sample(connection, sampler_id, since) or moment)
    waiting = Counter[str]()
    roots = [what.id, *what.runs]
    for (scope, status), count in _operations(connection, roots, what.samplers).items():
        owner = next((scopes[name] for name in names(scope) if name in scopes), None)
        if status == "pending" and owner is not None:
            waiting[owner] += count
    found = []
    for part in _parts(sorted({*scopes.values()})):
        query = select(t.sessions.c.session_id, t.sessions.c.last_seen_at, t.sessions.c.finished)
        known = {
            row[0]: row
            for row in connection.execute(query.where(t.sessions.c.session_id.in_(part)))
        }
        for session_id in part:
            # A session whose row was lost with its ledger can't be finished, only be idle.
            row = known.get(session_id)
            moments = [heard.get(session_id), row[1] if row is not None else None]
            last = max(moment for moment in moments if moment is not None)
            pending = waiting[session_id] if row is not None else 0
            if (row is None or row[2] is None) and (last >= since or pending):
                found.append(User(session_id, last, pending))
    return found


def readers(connection: Connection, runs: Collection[str], kinds: Iterable[str]) -> list[Reader]:
    """Return the other runs that have loaded, or will load, a checkpoint of these runs.

    Runs that are never brought back are left out: corrupted ones, copies, and those of a finished
    session without unfinished operations.

    Args:
        connection: the connection.
        runs: the runs that own the checkpoints.
        kinds: the kinds of operations that load a checkpoint, whose payloads are JSON.
    """
    columns = t.operations.c
    query = select(columns.scope, columns.place, columns.status, columns.payload).where(
        columns.kind.in_(list(kinds)),
        columns.status.in_(("pending", "succeeded")),
        columns.seq_id.is_not(None),
    )
    last: dict[str, int] = {}
    waiting: set[str] = set()
    for scope, place, status, payload in connection.execute(query):
        if scope not in runs and _run_of(payload) in runs:
            last[scope] = max(place, last.get(scope, place))
            waiting |= {scope} if status == "pending" else set()
    return [
        Reader(run_id, seq_id, run_id in waiting)
        for run_id, seq_id in sorted(last.items())
        if run_id in waiting or _comes_back(connection, run_id)
    ]


def remove_index(connection: Connection, kind: str, key: str, what: Owned | None) -> None:
    """Remove the rows by which a run, session or sampler is found.

    Args:
        connection: the connection.
        kind: ``run``, ``session`` or ``sampler``.
        key: its id.
        what: what it owns besides the rows that have its id, or None for these rows alone.
    """
    runs = [key] if kind == RUN else what.runs if what is not None else []
    samplers = [key] if kind == SAMPLER else what.samplers if what is not None else []
    for part in _parts(runs):
        for column in (t.runs.c.run_id, t.checkpoints.c.run_id):
            connection.execute(delete(column.table).where(column.in_(part)))
    for column in (t.deleted_checkpoints.c.path, t.weights_tokens.c.path, t.copies.c.path):
        for run in runs:
            connection.execute(delete(column.table).where(_under(column, f"{SCHEME}{run}/")))
    for part in _parts(samplers):
        connection.execute(delete(t.samplers).where(t.samplers.c.sampler_id.in_(part)))
    if kind != SAMPLER:
        connection.execute(delete(t.samplers).where(_under(t.samplers.c.sampler_id, f"{key}:")))
    if kind == SESSION:
        connection.execute(delete(t.sessions).where(t.sessions.c.session_id == key))


def remove_operations(connection: Connection, kind: str, key: str) -> tuple[bool, set[int]]:
    """Remove a batch of the operations of a run, session or sampler, with what they recorded.

    Returns:
        Whether there may be more, and the segments of the payload log that the rows named.
    """
    columns = t.operations.c
    found: list[str] = []
    segments: set[int] = set()
    for condition in _scopes(columns.scope, kind, key):
        left = REMOVED_AT_ONCE - len(found)
        query = select(columns.request_id, columns.payload_segment, columns.result_segment)
        for request_id, *named in connection.execute(query.where(condition).limit(left)):
            found.append(request_id)
            segments.update(each for each in named if each is not None)
    samples = t.recorded_samples.c
    gone = list(found)
    if kind == SESSION and len(found) < REMOVED_AT_ONCE:
        more = select(samples.request_id).where(samples.session_id == key).limit(REMOVED_AT_ONCE)
        gone += connection.scalars(more)
    for column in (samples.request_id, t.pins.c.pin, columns.request_id):
        for part in _parts(gone if column is samples.request_id else found):
            connection.execute(delete(column.table).where(column.in_(part)))
    return bool(gone), segments


def pending_requests(connection: Connection, what: Owned) -> list[str]:
    """Return the request ids of operations that have not ended."""
    columns = t.operations.c
    found: list[str] = []
    for condition in _all_scopes(columns.scope, [what.id, *what.runs], what.samplers):
        query = select(columns.request_id).where(condition, t.PENDING)
        found += connection.scalars(query)
    return list(dict.fromkeys(found))


def _tombstone(row: Any) -> Tombstone:
    row_checksums.check(t.tombstones, row)
    return Tombstone(**{key: value for key, value in row._mapping.items() if key != "seal"})


def _under(column: ColumnElement[str], prefix: str) -> ColumnElement[bool]:
    """Return the condition for texts that begin with a prefix, which an index can answer."""
    return and_(column >= prefix, column < prefix[:-1] + chr(ord(prefix[-1]) + 1))


def _scopes(column: ColumnElement[str], kind: str, key: str) -> list[ColumnElement[bool]]:
    """Return the conditions for the scopes that a run, session or sampler owns by its id."""
    alone = [column == key]
    return (
        alone if kind == SAMPLER else [*alone, _under(column, f"{key}:"), _under(column, f"{key}/")]
    )


def _all_scopes(
    column: ColumnElement[str], roots: Iterable[str], samplers: Iterable[str]
) -> Iterator[ColumnElement[bool]]:
    """Yield conditions for all scopes of some runs and sessions, and of samplers, each once."""
    known: set[str] = set()
    for root in roots:
        if known.isdisjoint(names(root)):
            known.add(root)
            yield from _scopes(column, RUN, root)
    for sampler in samplers:
        if known.isdisjoint(names(sampler)):
            yield column == sampler


def _operations(
    connection: Connection, roots: Sequence[str], samplers: Sequence[str]
) -> Counter[tuple[str, str]]:
    """Count the operations of some scopes, by scope and status."""
    columns = t.operations.c
    counts = Counter[tuple[str, str]]()
    for condition in _all_scopes(columns.scope, roots, samplers):
        query = select(columns.scope, columns.status, func.count()).where(condition)
        for scope, status, count in connection.execute(
            query.group_by(columns.scope, columns.status)
        ):
            counts[scope, status] = count
    return counts


def _samplers(connection: Connection, kind: str, key: str, runs: Sequence[str]) -> list[str]:
    columns = t.samplers.c
    conditions = [
        or_(
            _under(columns.sampler_id, f"{run}:"),
            columns.inflight_run == run,
            _under(columns.model_path, f"{SCHEME}{run}/"),
        )
        for run in runs
    ]
    if kind == SESSION:
        conditions.append(columns.session_id == key)
    found: dict[str, None] = {}
    for condition in conditions:
        mine = select(columns.sampler_id).where(condition).order_by(columns.sampler_id)
        found |= dict.fromkeys(connection.scalars(mine))
    return list(found)


def _checkpoints(connection: Connection, runs: Sequence[str]) -> Iterator[Checkpoint]:
    for part in _parts(runs):
        query = select(t.checkpoints).where(t.checkpoints.c.run_id.in_(part))
        rows = connection.execute(query.order_by(t.checkpoints.c.path))
        for row in row_checksums.intact(t.checkpoints, rows):
            yield q.record(Checkpoint, row)


def _last_sample(connection: Connection, sampler_id: str, since: datetime) -> datetime | None:
    """Return when a sample of a sampler was accepted, if one was since a time."""
    columns = t.operations.c
    query = select(columns.accepted_at).where(
        columns.scope == sampler_id, columns.accepted_at >= since
    )
    return connection.scalars(query.limit(1)).first()


def _comes_back(connection: Connection, run_id: str) -> bool:
    """Return whether a run may be brought back: it is live, and its session is open."""
    query = (
        select(t.runs.c.run_id)
        .outerjoin(t.sessions, t.sessions.c.session_id == t.runs.c.session_id)
        .where(
            t.runs.c.run_id == run_id, t.runs.c.status == "live", t.sessions.c.finished.is_(None)
        )
    )
    if connection.execute(query).first() is not None:
        return True
    columns = t.operations.c
    waiting = select(columns.request_id).where(columns.scope == run_id, t.PENDING)
    return connection.execute(waiting.limit(1)).first() is not None


def _run_of(payload: bytes) -> str | None:
    """Return the run whose checkpoint an operation loads, or None if its payload is damaged."""
    with contextlib.suppress(ValueError, KeyError, TypeError, WireError):
        return parse_path(json.loads(payload)["path"]).run_id
    return None


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split ids into parts that fit into one statement."""
    for begin in range(0, len(ids), _IDS_AT_ONCE):
        yield ids[begin : begin + _IDS_AT_ONCE]
