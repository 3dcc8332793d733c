"""Audit log: the changes of checkpoints and projects and their actors, in order.

An event is written in the transaction of the change that it records.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, func, insert, select, update

from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.records import Event
from everstep.ledger.sqlite import row_checksums
from everstep.ledger.store import Store


def record(connection: Connection, event: Event | None) -> None:
    """Write an event as part of a transaction. None writes nothing."""
    if event is None:
        return
    values = {name: value for name, value in vars(event).items() if name != "number"}
    values["at"] = event.at or q.now()
    number = connection.execute(insert(t.audit).values(**values)).inserted_primary_key[0]  # type: ignore[index]
    mine = t.audit.c.number == number
    whole = connection.execute(select(t.audit).where(mine)).one()
    checksum = row_checksums.checksum(dict(whole._mapping))
    connection.execute(update(t.audit).where(mine).values(seal=checksum))


class AuditLog:
    """Queries of the log, and events that belong to no other transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def record(self, event: Event) -> None:
        """Write an event. It is durable on return."""
        await self._store.run(lambda c: record(c, event))

    async def events_between(
        self,
        start: datetime,
        end: datetime,
        *,
        resource: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[Event]:
        """Return the events of a window of time, in the order of the log.

        Args:
            start: the start of the window.
            end: the end of the window, exclusive.
            resource: return only events on this kind of resource: ``checkpoint``, ``project``.
            after: the number of the last event of the previous page.
            limit: the maximum number of events.
        """
        columns = t.audit.c
        where = [columns.at >= start, columns.at < end, columns.number > after]
        if resource is not None:
            where.append(func.substr(columns.event, 1, len(resource) + 1) == f"{resource}_")
        query = select(t.audit).where(*where).order_by(columns.number).limit(limit)

        def work(connection: Connection) -> list[Event]:
            rows = row_checksums.intact(t.audit, connection.execute(query))
            return [_event(dict(row._mapping)) for row in rows]

        return await self._store.read(work)


def _event(values: dict[str, object]) -> Event:
    return Event(**{name: value for name, value in values.items() if name != "seal"})  # type: ignore[arg-type]
