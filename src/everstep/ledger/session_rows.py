"""Statements on sessions, each one unit of a transaction."""

from __future__ import annotations

from sqlalchemy import Connection, select

from everstep.ledger import audit
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.records import Event, Sampler, Session
from everstep.ledger.sqlite import row_checksums


def create(connection: Connection, session: Session, idempotency_key: str | None) -> Session:
    """Create a session, or return the one that was created with the same key."""
    if idempotency_key is not None:
        mine = t.sessions.c.idempotency_key == idempotency_key
        row = connection.execute(select(t.sessions).where(mine)).one_or_none()
        if row is not None:
            row_checksums.check(t.sessions, row)
            return q.record(Session, row)
    values = {**vars(session), "idempotency_key": idempotency_key}
    row_checksums.insert(connection, t.sessions, values)
    return session


def touch(connection: Connection, session_id: str) -> None:
    """Record that a session's client is alive."""
    mine = t.sessions.c.session_id == session_id
    row_checksums.update(connection, t.sessions, mine, last_seen_at=q.now())


def finish(connection: Connection, session_id: str, reason: str, detail: str | None) -> None:
    """End a session. One that has ended keeps its first reason."""
    mine = (t.sessions.c.session_id == session_id, t.sessions.c.finished.is_(None))
    values = {"finished": reason, "detail": detail, "finished_at": q.now()}
    row_checksums.update(connection, t.sessions, *mine, **values)


def create_sampler(connection: Connection, sampler: Sampler, event: Event | None) -> Sampler:
    """Create a sampler and record the event, unless it exists, and return the one that does."""
    known = q.one(connection, Sampler, t.samplers, sampler.sampler_id)
    if known is None:
        q.put(connection, t.samplers, sampler)
        audit.record(connection, event)
    return known or sampler
