"""What is there, by session and project: lists, search, what an operation took, storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select

from everstep.ledger import audit, seals
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.records import Checkpoint, Event, Run, Session
from everstep.ledger.writer import Writer


@dataclass(frozen=True)
class SessionQuery:
    """Which sessions are looked for; each that is given has to be met.

    Attributes:
        session_id: exactly this one; together with ``words`` either is enough.
        words: each is in the display name, whatever its case.
        project_ids: in one of these projects.
        user_metadata: has all of these pairs.
        finished: ended in one of these ways; None among them: not ended. None: whichever.
        before: only what comes after this time and id, newest first.
        limit: at most so many.
    """

    session_id: str | None = None
    words: Sequence[str] = ()
    project_ids: Sequence[str] | None = None
    user_metadata: dict[str, str] = field(default_factory=dict)
    finished: Sequence[str | None] | None = None
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

        def work(connection: Connection) -> list[Session]:
            found: list[Session] = []
            for row in seals.intact(t.sessions, connection.execute(query)):
                session = q.record(Session, row)
                if wanted.user_metadata.items() <= _texts(session).items():
                    found.append(session)
                if len(found) == wanted.limit:
                    break
            return found

        return await self._writer.run(work)

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

    async def ended(self) -> list[Checkpoint]:
        """Unnamed sampler saves that no sampler of a session that is open, and no sample, needs."""
        path = t.checkpoints.c.path
        sampled = select(t.samplers.c.model_path).join(
            t.sessions, t.sessions.c.session_id == t.samplers.c.session_id
        )
        needed = sampled.where(_unfinished(), t.samplers.c.model_path.is_not(None))
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


def _unfinished() -> ColumnElement[bool]:
    return t.sessions.c.finished.is_(None)


def _of_project(project_id: str) -> Any:
    return select(t.sessions.c.session_id).where(t.sessions.c.project_id == project_id)


def _conditions(wanted: SessionQuery) -> list[ColumnElement[bool]]:
    columns = t.sessions.c
    where: list[ColumnElement[bool]] = []
    named = [
        func.lower(columns.display_name).contains(word.lower(), autoescape=True)
        for word in wanted.words
    ]
    if wanted.session_id is not None:
        mine = columns.session_id == wanted.session_id
        where.append(or_(mine, and_(*named)) if named else mine)
    elif named:
        where.append(and_(*named))
    if wanted.project_ids is not None:
        where.append(columns.project_id.in_(wanted.project_ids))
    if wanted.finished is not None:
        ways = [way for way in wanted.finished if way is not None]
        some = columns.finished.in_(ways)
        where.append(or_(some, _unfinished()) if None in wanted.finished else some)
    if wanted.before is not None:
        at, session_id = wanted.before
        same = and_(columns.created_at == at, columns.session_id < session_id)
        where.append(or_(columns.created_at < at, same))
    return where


def _texts(session: Session) -> dict[str, str]:
    return {key: str(value) for key, value in session.user_metadata.items()}
