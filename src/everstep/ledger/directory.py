"""What is there, by session and project: lists, search, what an operation took, storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, Table, and_, func, or_, select

from everstep.ledger import audit, seals
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.records import Checkpoint, Event, Run, Session, as_texts
from everstep.ledger.writer import Writer


@dataclass(frozen=True)
class SessionQuery:
    """Which sessions are looked for; each that is given has to be met.

    Attributes:
        session_id: exactly this one; together with ``words`` either is enough.
        words: each is in the display name, whatever its case.
        project_ids: in one of these projects; None among them: in none.
        user_metadata: has all of these pairs.
        finished: ended in one of these ways; None among them: not ended. None: whichever.
        before: only what comes after this time and id, newest first.
        limit: at most so many.
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
    """Which checkpoints are looked for; each that is given has to be met.

    Attributes:
        kinds: of one of these kinds.
        project_ids: of runs in one of these projects; None among them: in none.
        user_metadata: has all of these pairs.
        base_models: of one of these models.
        before: only what comes after this time and path, newest first.
        limit: at most so many.
    """

    kinds: Sequence[str]
    project_ids: Sequence[str | None] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    base_models: Sequence[str] | None = None
    before: tuple[datetime, str] | None = None
    limit: int = 50


@dataclass(frozen=True)
class Span:
    """When an operation was accepted, how long it was executed, and when it was finished."""

    scope: str
    place: int
    kind: str
    status: str
    accepted_at: datetime
    finished_at: datetime | None
    seconds: float | None
    error: str | None
    request_id: str


@dataclass(frozen=True)
class Stored:
    """How many checkpoints there are in a project, and their bytes."""

    project_id: str | None
    count: int
    size_bytes: int


class Directory:
    """Reads the ledger by session and project."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def sessions(self, limit: int, offset: int) -> list[Session]:
        """A page of sessions, newest first."""
        order = (t.sessions.c.created_at.desc(), t.sessions.c.session_id.desc())
        rows, _ = await self._writer.run(lambda c: q.page(c, t.sessions, order, limit, offset))
        return [q.record(Session, row) for row in rows]

    async def search(self, wanted: SessionQuery) -> list[Session]:
        """The sessions that meet a query, newest first."""
        columns = t.sessions.c
        order = (columns.created_at.desc(), columns.session_id.desc())
        query = select(t.sessions).where(*_conditions(wanted)).order_by(*order)
        meets = partial(_meets, wanted)
        return await self._first(Session, t.sessions, query, meets, wanted.limit)

    async def members(self, session_id: str) -> tuple[list[str], list[str]]:
        """The ids of a session's runs and samplers, oldest first."""
        runs = select(t.runs.c.run_id).where(t.runs.c.session_id == session_id)
        samplers = select(t.samplers.c.sampler_id).where(t.samplers.c.session_id == session_id)

        def work(connection: Connection) -> tuple[list[str], list[str]]:
            in_order = runs.order_by(t.runs.c.created_at, t.runs.c.run_id)
            found = list(connection.execute(in_order).scalars())
            others = samplers.order_by(t.samplers.c.created_at, t.samplers.c.sampler_id)
            return found, list(connection.execute(others).scalars())

        return await self._writer.run(work)

    async def runs(
        self, limit: int, offset: int, project_id: str | None = None
    ) -> tuple[list[Run], int]:
        """A page of runs, the latest used first, and how many there are."""
        where = [] if project_id is None else [t.runs.c.session_id.in_(_of_project(project_id))]
        order = (t.runs.c.last_request_at.desc(), t.runs.c.run_id)
        rows, total = await self._writer.run(
            lambda c: q.page(c, t.runs, order, limit, offset, *where)
        )
        return [q.record(Run, row) for row in rows], total

    async def checkpoints(
        self, limit: int, offset: int, kinds: Sequence[str] | None = None
    ) -> tuple[list[Checkpoint], int]:
        """A page of all listed, unexpired checkpoints, newest first, and how many there are."""
        where = [q.unexpired(), t.checkpoints.c.listed]
        if kinds is not None:
            where.append(t.checkpoints.c.kind.in_(kinds))
        order = (t.checkpoints.c.created_at.desc(), t.checkpoints.c.path)
        rows, total = await self._writer.run(
            lambda c: q.page(c, t.checkpoints, order, limit, offset, *where)
        )
        return [q.record(Checkpoint, row) for row in rows], total

    async def search_checkpoints(self, wanted: CheckpointQuery) -> list[Checkpoint]:
        """The listed, unexpired checkpoints that meet a query, newest first."""
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
        """The first intact rows of a query that also meet what the database can't tell."""

        def work(connection: Connection) -> list[q.Record]:
            rows = seals.intact(table, connection.execute(query))
            found = (q.record(record, row) for row in rows)
            return list(islice(filter(meets, found), limit))

        return await self._writer.run(work)

    async def assign(self, session_id: str, project_id: str, event: Event) -> bool:
        """Move a session into a project; returns whether there is such a session."""
        mine = t.sessions.c.session_id == session_id

        def work(connection: Connection) -> bool:
            known = q.one(connection, Session, t.sessions, session_id)
            if known is not None and known.project_id != project_id:
                seals.change(connection, t.sessions, mine, project_id=project_id)
                audit.note(connection, event)
            return known is not None

        return await self._writer.run(work)

    async def ended(self, unheard_seconds: float | None = None) -> list[Checkpoint]:
        """Unnamed sampler saves that no sampler of a session that is open, and no sample, needs.

        Args:
            unheard_seconds: an open session needs no sampler that is that old, when for so long
                neither its client was heard of nor the sampler used; None: it needs them all.
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
        waiting = select(columns.weights).where(
            columns.status == "pending", columns.weights.is_not(None)
        )
        here = (~t.checkpoints.c.listed, path.not_in(needed), path.not_in(waiting))
        query = select(t.checkpoints).where(*here).order_by(path)

        def work(connection: Connection) -> list[Checkpoint]:
            rows = seals.intact(t.checkpoints, connection.execute(query))
            return [q.record(Checkpoint, row) for row in rows]

        return await self._writer.run(work)

    async def stored(self, project_id: str | None = None) -> list[Stored]:
        """What is kept by project: all that can be loaded, unnamed sampler saves included."""
        size = func.coalesce(func.sum(t.checkpoints.c.size_bytes), 0)
        columns = (t.sessions.c.project_id, func.count(), size)
        by_run = t.checkpoints.outerjoin(t.runs, t.runs.c.run_id == t.checkpoints.c.run_id)
        whole = by_run.outerjoin(t.sessions, t.sessions.c.session_id == t.runs.c.session_id)
        where = [q.unexpired()]
        if project_id is not None:
            where.append(t.sessions.c.project_id == project_id)
        query = select(*columns).select_from(whole).where(*where)
        grouped = query.group_by(t.sessions.c.project_id).order_by(t.sessions.c.project_id)

        def work(connection: Connection) -> list[Stored]:
            return [Stored(*row) for row in connection.execute(grouped)]

        return await self._writer.run(work)

    async def stored_by(self, session_ids: Sequence[str]) -> dict[str, Stored]:
        """What sessions keep, by their ids; those that keep nothing are left out."""
        session_id = t.runs.c.session_id
        query = (
            select(session_id, func.count(), func.sum(t.checkpoints.c.size_bytes))
            .join(t.runs, t.runs.c.run_id == t.checkpoints.c.run_id)
            .where(q.unexpired(), t.checkpoints.c.listed, session_id.in_(session_ids))
            .group_by(session_id)
        )

        def work(connection: Connection) -> dict[str, Stored]:
            rows = connection.execute(query)
            return {one: Stored(None, count, size or 0) for one, count, size in rows}

        return await self._writer.run(work)

    async def spans(self, session_id: str) -> list[Span]:
        """All operations of a session in the order in which they were accepted."""
        columns = t.operations.c
        names = ("scope", "place", "kind", "status", "accepted_at", "finished_at", "seconds")
        wanted = [columns[name] for name in (*names, "error", "request_id")]
        query = select(*wanted).where(columns.session_id == session_id)
        ordered = query.order_by(columns.accepted_at, columns.scope, columns.place)
        return await self._writer.run(lambda c: [Span(*row) for row in c.execute(ordered)])


def _heard_of(since: datetime) -> ColumnElement[bool]:
    """Samplers that are new or were used since a time, or whose session's client was heard of."""
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
    """What comes after a row where the newest comes first, and the greatest key among equals."""
    return or_(time < last_time, and_(time == last_time, key < last_key))


def _among(column: Column[Any], values: Sequence[str | None]) -> ColumnElement[bool]:
    some = column.in_([value for value in values if value is not None])
    return or_(some, column.is_(None)) if None in values else some


def _meets(wanted: SessionQuery, session: Session) -> bool:
    """Whether a session meets what the database can't tell: SQLite knows no case but ASCII's."""
    if not wanted.user_metadata.items() <= as_texts(session.user_metadata).items():
        return False
    if wanted.words and session.session_id == wanted.session_id:
        return True
    name = (session.display_name or "").casefold()
    return all(word.casefold() in name for word in wanted.words)
