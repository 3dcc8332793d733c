"""The audit log: what was done to checkpoints and projects, by whom, in the order it was done.

An event is written in the transaction of what it tells, so that neither is there without the other.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, func, insert, select, update

from everstep.ledger import queries as q
from everstep.ledger import seals
from everstep.ledger import tables as t
from everstep.ledger.records import Event
from everstep.ledger.writer import Writer


def note(connection: Connection, event: Event | None) -> None:
    """Write an event as part of a transaction; None: there is nothing to tell."""
    if event is None:
        return
    values = {name: value for name, value in vars(event).items() if name != "number"}
    values["at"] = event.at or q.now()
    number = connection.execute(insert(t.audit).values(**values)).inserted_primary_key[0]  # type: ignore[index]
    mine = t.audit.c.number == number
    whole = connection.execute(select(t.audit).where(mine)).one()
    sealed = seals.seal(dict(whole._mapping))
    connection.execute(update(t.audit).where(mine).values(seal=sealed))


class AuditLog:
    """Reads the log, and writes what belongs to no other transaction."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def note(self, event: Event) -> None:
        """Write an event; durable on return."""
        await self._writer.run(lambda c: note(c, event))

    async def between(
        self,
        start: datetime,
        end: datetime,
        *,
        resource: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[Event]:
        """Events of a window of time, in the order of the log.

        Args:
            start: its begin.
            end: its end, excluded.
            resource: only events on this one: ``checkpoint``, ``project``.
            after: the number of the last event that was seen.
            limit: at most so many.
        """
        columns = t.audit.c
        where = [columns.at >= start, columns.at < end, columns.number > after]
        if resource is not None:
            where.append(func.substr(columns.event, 1, len(resource) + 1) == f"{resource}_")
        query = select(t.audit).where(*where).order_by(columns.number).limit(limit)

        def work(connection: Connection) -> list[Event]:
            rows = seals.intact(t.audit, connection.execute(query))
            return [_event(dict(row._mapping)) for row in rows]

        return await self._writer.run(work)


def _event(values: dict[str, object]) -> Event:
    return Event(**{name: value for name, value in values.items() if name != "seal"})  # type: ignore[arg-type]
