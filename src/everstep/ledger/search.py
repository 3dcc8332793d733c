"""Search: pages and searches of sessions, runs and checkpoints, storage use, operation spans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, Table, and_, func, or_, select

from everstep.ledger import audit, checkpoint_index
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.memory import Memory
from everstep.ledger.records import Checkpoint, Event, Run, Session, as_strings
from everstep.ledger.sqlite import row_checksums
from everstep.ledger.store import Store

_SCOPES_AT_ONCE = 200


@dataclass(frozen=True)
class SessionQuery:
    """A search for sessions. A session has to meet every condition that is given.

    Attributes:
        session_id: exactly this session. If ``words`` is given too, meeting either is enough.
        words: each is part of the display name, ignoring case.
        project_ids: in one of these projects. A None among them stands for no project.
        user_metadata: has all of these pairs.
        finished: ended in one of these ways. A None among them stands for open sessions.
        before: the creation time and id of the last session of the previous page.
        limit: the maximum number of results.
    """

    session_id: str | None = None
    words: Sequence[str] = ()
    project_ids: Sequence[str | None] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    finished: Sequence[str | None] | None = None
    before: tuple[datetime, str] | None = None
    limit: int = 50


@dataclass(frozen=True)
class CheckpointQuery:
    """A search for checkpoints. A checkpoint has to meet every condition that is given.

    Attributes:
        kinds: of one of these kinds.
        project_ids: of runs in one of these projects. A None among them stands for no project.
        user_metadata: has all of these pairs.
        base_models: of one of these models.
        before: the creation time and path of the last checkpoint of the previous page.
        limit: the maximum number of results.
    """

    kinds: Sequence[str]
    project_ids: Sequence[str | None] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    base_models: Sequence[str] | None = None
    before: tuple[datetime, str] | None = None
    limit: int = 50


@dataclass(frozen=True)
class OperationSpan:
    """The times of an operation: accepted, finished, and the seconds of its execution."""

    scope: str
    seq_id: int
    kind: str
    status: str
    accepted_at: datetime
    finished_at: datetime | None
    seconds: float | None
    error: str | None
    request_id: str


@dataclass(frozen=True)
class StorageUsage:
    """The number and total size of the checkpoints in a project."""

    project_id: str | None
    count: int
    size_bytes: int


class LedgerSearch:
    """Lists and searches of the ledger by session and project.

    Args:
        store: the database.
        memory: knows when runs were used last.
    """

    def __init__(self, store: Store, memory: Memory) -> None:
        self._store = store
        self._memory = memory

    async def list_sessions(self, limit: int, offset: int) -> list[Session]:
        """Return a page of sessions, newest first."""
        order = (t.sessions.c.created_at.desc(), t.sessions.c.session_id.desc())
        rows, _ = await self._store.read(lambda c: q.page(c, t.sessions, order, limit, offset))
        return [q.record(Session, row) for row in rows]

    async def search_sessions(self, wanted: SessionQuery) -> list[Session]:
        """Return the sessions that meet a query, newest first."""
        columns = t.sessions.c
        order = (columns.created_at.desc(), columns.session_id.desc())
        query = select(t.sessions).where(*_conditions(wanted)).order_by(*order)
        meets = partial(_meets, wanted)
        return await self._first(Session, t.sessions, query, meets, wanted.limit)

    async def session_members(self, session_id: str) -> tuple[list[str], list[str]]:
        """Return the ids of a session's runs and samplers, oldest first."""
        runs = select(t.runs.c.run_id).where(t.runs.c.session_id == session_id)
        samplers = select(t.samplers.c.sampler_id).where(t.samplers.c.session_id == session_id)

        def work(connection: Connection) -> tuple[list[str], list[str]]:
            in_order = runs.order_by(t.runs.c.created_at, t.runs.c.run_id)
            found = list(connection.execute(in_order).scalars())
            others = samplers.order_by(t.samplers.c.created_at, t.samplers.c.sampler_id)
            return found, list(connection.execute(others).scalars())

        return await self._store.read(work)

    async def list_runs(
        self, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[Run], int]:
        """Return a page of runs, the latest used first, and their total number."""
        where = [] if project_id is None else [t.runs.c.session_id.in_(_of_project(project_id))]
        order = (t.runs.c.last_request_at.desc(), t.runs.c.run_id)
        await self._memory.flush(self._store)
        rows, total = await self._store.read(
            lambda c: q.page(c, t.runs, order, limit, offset, *where)
        )
        return [q.record(Run, row) for row in rows], total

    async def list_checkpoints(
        self, limit: int, offset: int, kinds: Sequence[str] | None = None
    ) -> tuple[list[Checkpoint], int]:
        """Return a page of listed, unexpired checkpoints, newest first, and their total number."""
        where = [q.unexpired(), t.checkpoints.c.listed]
        if kinds is not None:
            where.append(t.checkpoints.c.kind.in_(kinds))
        order = (t.checkpoints.c.created_at.desc(), t.checkpoints.c.path)
        rows, total = await self._store.read(
            lambda c: q.page(c, t.checkpoints, order, limit, offset, *where)
        )
        return [q.record(Checkpoint, row) for row in rows], total

    async def newest_checkpoints(
        self, run_ids: Sequence[str], kinds: Sequence[str]
    ) -> dict[str, list[Checkpoint]]:
        """Return the newest listed, unexpired checkpoint of each kind, by run."""

        def work(connection: Connection) -> dict[str, list[Checkpoint]]:
            found: dict[str, list[Checkpoint]] = {each: [] for each in run_ids}
            for kind in kinds:
                for row in checkpoint_index.newest(connection, run_ids, kind):
                    found[row.run_id].append(row)
            return found

        return await self._store.read(work)

    async def search_checkpoints(self, wanted: CheckpointQuery) -> list[Checkpoint]:
        """Return the listed, unexpired checkpoints that meet a query, newest first."""
        columns = t.checkpoints.c
        where = [q.unexpired(), columns.listed, columns.kind.in_(wanted.kinds)]
        if wanted.base_models is not None:
            where.append(columns.base_model.in_(wanted.base_models))
        if wanted.project_ids is not None:
            mine = t.sessions.c.session_id == t.runs.c.session_id
            runs = select(t.runs.c.run_id).join(t.sessions, mine)
            in_project = runs.where(_among(t.sessions.c.project_id, wanted.project_ids))
            where.append(columns.run_id.in_(in_project))
        if wanted.before is not None:
            where.append(_behind(columns.created_at, columns.path, *wanted.before))
        order = (columns.created_at.desc(), columns.path.desc())
        query = select(t.checkpoints).where(*where).order_by(*order)
        pairs = wanted.user_metadata.items()

        def meets(checkpoint: Checkpoint) -> bool:
            return pairs <= (checkpoint.user_metadata or {}).items()

        return await self._first(Checkpoint, t.checkpoints, query, meets, wanted.limit)

    async def _first(
        self,
        record: type[q.Record],
        table: Table,
        query: Select[Any],
        meets: Callable[[q.Record], bool],
        limit: int,
    ) -> list[q.Record]:
        """Return the first intact rows of a query that also meet a condition in Python."""

        def work(connection: Connection) -> list[q.Record]:
            rows = row_checksums.intact(table, connection.execute(query))
            found = (q.record(record, row) for row in rows)
            return list(islice(filter(meets, found), limit))

        return await self._store.read(work)

    async def assign_project(self, session_id: str, project_id: str, event: Event) -> bool:
        """Move a session into a project, and return whether the session exists."""
        mine = t.sessions.c.session_id == session_id

        def work(connection: Connection) -> bool:
            known = q.one(connection, Session, t.sessions, session_id)
            if known is not None and known.project_id != project_id:
                row_checksums.update(connection, t.sessions, mine, project_id=project_id)
                audit.record(connection, event)
            return known is not None

        return await self._store.run(work)

    async def unneeded_sampler_saves(
        self, unheard_seconds: float | None = None
    ) -> list[Checkpoint]:
        """Return unnamed sampler saves that no sampler of an open session and no sample needs.

        Args:
            unheard_seconds: treat a sampler of an open session as unneeded once it is that old,
                its client has sent no heartbeat and nobody has used it for that long. None: an
                open session needs all of its samplers.
        """
        path = t.checkpoints.c.path
        sampled = select(t.samplers.c.model_path).join(
            t.sessions, t.sessions.c.session_id == t.samplers.c.session_id
        )
        alive = [_unfinished(), t.samplers.c.model_path.is_not(None)]
        if unheard_seconds is not None:
            alive.append(_heard_of(q.now() - timedelta(seconds=unheard_seconds)))
        needed = sampled.where(*alive)
        columns = t.operations.c
        waiting = select(columns.weights).where(t.PENDING, columns.weights.is_not(None))
        here = (~t.checkpoints.c.listed, path.not_in(needed), path.not_in(waiting))
        query = select(t.checkpoints).where(*here).order_by(path)

        def work(connection: Connection) -> list[Checkpoint]:
            rows = row_checksums.intact(t.checkpoints, connection.execute(query))
            return [q.record(Checkpoint, row) for row in rows]

        return await self._store.read(work)

    async def storage_by_project(self, project_id: str | None = None) -> list[StorageUsage]:
        """Return the storage use by project, including unnamed sampler saves."""
        size = func.coalesce(func.sum(t.checkpoints.c.size_bytes), 0)
        columns = (t.sessions.c.project_id, func.count(), size)
        by_run = t.checkpoints.outerjoin(t.runs, t.runs.c.run_id == t.checkpoints.c.run_id)
        whole = by_run.outerjoin(t.sessions, t.sessions.c.session_id == t.runs.c.session_id)
        where = [q.unexpired()]
        if project_id is not None:
            where.append(t.sessions.c.project_id == project_id)
        query = select(*columns).select_from(whole).where(*where)
        grouped = query.group_by(t.sessions.c.project_id).order_by(t.sessions.c.project_id)

        def work(connection: Connection) -> list[StorageUsage]:
            return [StorageUsage(*row) for row in connection.execute(grouped)]

        return await self._store.read(work)

    async def storage_by_session(self, session_ids: Sequence[str]) -> dict[str, StorageUsage]:
        """Return the storage use of sessions by id. Sessions without checkpoints are left out."""
        session_id = t.runs.c.session_id
        query = (
            select(session_id, func.count(), func.sum(t.checkpoints.c.size_bytes))
            .join(t.runs, t.runs.c.run_id == t.checkpoints.c.run_id)
            .where(q.unexpired(), t.checkpoints.c.listed, session_id.in_(session_ids))
            .group_by(session_id)
        )

        def work(connection: Connection) -> dict[str, StorageUsage]:
            rows = connection.execute(query)
            return {one: StorageUsage(None, count, size or 0) for one, count, size in rows}

        return await self._store.read(work)

    async def replayable_runs(self) -> list[str]:
        """Return the ids of the runs that may be brought back: live, in an open session."""
        query = (
            select(t.runs.c.run_id)
            .join(t.sessions, t.sessions.c.session_id == t.runs.c.session_id)
            .where(t.runs.c.status == "live", _unfinished())
        )
        return await self._store.read(lambda c: list(c.execute(query).scalars()))

    async def executed_seconds(
        self, positions: Mapping[str, int], kinds: Iterable[str]
    ) -> dict[str, float]:
        """Return how long the operations after a position in each scope took to execute.

        Args:
            positions: scopes, and the sequence id after which to add up.
            kinds: the kinds of operations to add up. Those that failed don't count.

        Returns:
            Seconds by scope. Scopes without any are left out.
        """
        columns = t.operations.c
        total = func.sum(columns.seconds)
        found: dict[str, float] = {}
        scopes = list(positions.items())
        for begin in range(0, len(scopes), _SCOPES_AT_ONCE):
            some = scopes[begin : begin + _SCOPES_AT_ONCE]
            after = or_(*(and_(columns.scope == s, columns.seq_id > p) for s, p in some))
            query = (
                select(columns.scope, total)
                .where(after, columns.status == "succeeded", columns.kind.in_(list(kinds)))
                .group_by(columns.scope)
                .having(total > 0)
            )
            found.update(await self._store.read(partial(_pairs, query)))
        return found

    async def operation_spans(self, session_id: str) -> list[OperationSpan]:
        """Return all operations of a session in the order in which they were accepted."""
        columns = t.operations.c
        names = ("scope", "place", "kind", "status", "accepted_at", "finished_at", "seconds")
        wanted = [columns[name] for name in (*names, "error", "request_id")]
        query = select(*wanted).where(columns.session_id == session_id)
        ordered = query.order_by(columns.accepted_at, columns.scope, columns.place)
        return await self._store.read(lambda c: [OperationSpan(*row) for row in c.execute(ordered)])


def _pairs(query: Select[Any], connection: Connection) -> dict[str, float]:
    return {row[0]: row[1] for row in connection.execute(query)}


def _heard_of(since: datetime) -> ColumnElement[bool]:
    """Return the condition for samplers created, used or heard of since a time."""
    columns = t.operations.c
    used = columns.scope == t.samplers.c.sampler_id, columns.accepted_at >= since
    return or_(
        t.sessions.c.last_seen_at >= since,
        t.samplers.c.created_at >= since,
        select(columns.request_id).where(*used).exists(),
    )


def _unfinished() -> ColumnElement[bool]:
    return t.sessions.c.finished.is_(None)


def _of_project(project_id: str) -> Any:
    return select(t.sessions.c.session_id).where(t.sessions.c.project_id == project_id)


def _conditions(wanted: SessionQuery) -> list[ColumnElement[bool]]:
    columns = t.sessions.c
    where: list[ColumnElement[bool]] = []
    if wanted.session_id is not None and not wanted.words:
        where.append(columns.session_id == wanted.session_id)
    if wanted.project_ids is not None:
        where.append(_among(columns.project_id, wanted.project_ids))
    if wanted.finished is not None:
        where.append(_among(columns.finished, wanted.finished))
    if wanted.before is not None:
        where.append(_behind(columns.created_at, columns.session_id, *wanted.before))
    return where


def _behind(
    time: Column[Any], key: Column[Any], last_time: datetime, last_key: str
) -> ColumnElement[bool]:
    """Return the condition for rows after another, in descending order of time and key."""
    return or_(time < last_time, and_(time == last_time, key < last_key))


def _among(column: Column[Any], values: Sequence[str | None]) -> ColumnElement[bool]:
    some = column.in_([value for value in values if value is not None])
    return or_(some, column.is_(None)) if None in values else some


def _meets(wanted: SessionQuery, session: Session) -> bool:
    """Return whether a session meets the conditions on text (SQLite folds ASCII's case only)."""
    if not wanted.user_metadata.items() <= as_strings(session.user_metadata).items():
        return False
    if wanted.words and session.session_id == wanted.session_id:
        return True
    name = (session.display_name or "").casefold()
    return all(word.casefold() in name for word in wanted.words)
