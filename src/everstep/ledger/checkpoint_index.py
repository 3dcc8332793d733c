"""Checkpoint index: statements for maintenance, over expired and quarantined rows as well."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime

from sqlalchemy import Connection, delete, select

from everstep.ledger import audit
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.deletion import buried_ids
from everstep.ledger.records import Checkpoint, Event, Operation, Run
from everstep.ledger.sqlite import row_checksums


def all_checkpoints(connection: Connection) -> list[Checkpoint]:
    """Return all rows of the index, by path."""
    query = select(t.checkpoints).order_by(t.checkpoints.c.path)
    rows = row_checksums.intact(t.checkpoints, connection.execute(query))
    return [q.record(Checkpoint, row) for row in rows]


def newest(connection: Connection, run_ids: Collection[str], kind: str) -> list[Checkpoint]:
    """Return the newest listed, unexpired checkpoint of a kind of each run that has one."""
    columns, newest_rows = t.checkpoints.c, t.checkpoints.alias("newest")
    path = (
        select(columns.path)
        .where(columns.run_id == t.runs.c.run_id, columns.kind == kind)
        .where(columns.listed, q.unexpired())
        .order_by(columns.created_at.desc(), columns.path.desc())
        .limit(1)
        .correlate(t.runs)
        .scalar_subquery()
    )
    pairs = t.runs.join(newest_rows, newest_rows.c.path == path)
    query = select(newest_rows).select_from(pairs).where(t.runs.c.run_id.in_(run_ids))
    rows = connection.execute(query)
    return [q.record(Checkpoint, row) for row in row_checksums.intact(t.checkpoints, rows)]


def is_indexed(connection: Connection, path: str) -> bool:
    """Return whether a checkpoint has a row, even an expired, quarantined or unlisted one."""
    query = select(t.checkpoints.c.path).where(t.checkpoints.c.path == path)
    return connection.execute(query).first() is not None


def expired(connection: Connection, before: datetime) -> list[Checkpoint]:
    """Return the checkpoints that had expired at a time, the longest expired first."""
    expires = t.checkpoints.c.expires_at
    query = select(t.checkpoints).where(expires <= before).order_by(expires, t.checkpoints.c.path)
    rows = row_checksums.intact(t.checkpoints, connection.execute(query))
    return [q.record(Checkpoint, row) for row in rows]


def pending(connection: Connection, kinds: Iterable[str]) -> list[Operation]:
    """Return the pending operations of some kinds."""
    here = (t.PENDING, t.operations.c.kind.in_(list(kinds)))
    return q.operations_where(connection, *here)


def remove(connection: Connection, path: str, event: Event | None) -> bool:
    """Replace a checkpoint by a tombstone, record the event, and return whether it existed."""
    deleted = q.delete_checkpoint(connection, path)
    audit.record(connection, event if deleted else None)
    return deleted


def set_quarantined(connection: Connection, paths: Iterable[str]) -> int:
    """Quarantine these checkpoints and release all others, and return how many rows changed."""
    wanted = set(paths)
    changed = 0
    for each in all_checkpoints(connection):
        if each.quarantined != (each.path in wanted):
            mine = t.checkpoints.c.path == each.path
            row_checksums.update(connection, t.checkpoints, mine, quarantined=not each.quarantined)
            changed += 1
    return changed


def insert_missing(
    connection: Connection, runs: Iterable[Run], checkpoints: Iterable[Checkpoint]
) -> tuple[int, int]:
    """Insert the runs and checkpoints that have no intact row and were not deleted.

    A checkpoint is deleted with its run, and both with their session.

    Returns:
        The numbers of runs and of checkpoints that were inserted.
    """
    drop_damaged(connection)
    known_runs = set(connection.execute(select(t.runs.c.run_id)).scalars())
    known = set(connection.execute(select(t.checkpoints.c.path)).scalars())
    known.update(connection.execute(select(t.deleted_checkpoints.c.path)).scalars())
    buried = buried_ids(connection)
    new_runs = [
        vars(run) for run in runs if run.run_id not in known_runs and not buried(run.run_id)
    ]
    new = [vars(each) for each in checkpoints if each.path not in known and not buried(each.run_id)]
    for table, rows in ((t.runs, new_runs), (t.checkpoints, new)):
        for row in rows:
            row_checksums.insert(connection, table, row)
    return len(new_runs), len(new)


def drop_damaged(connection: Connection) -> None:
    """Remove damaged rows of runs and checkpoints, which manifests can restore."""
    for table in (t.runs, t.checkpoints):
        column = next(iter(table.primary_key.columns))
        rows = connection.execute(select(table)).all()
        whole = {row._mapping[column.name] for row in row_checksums.intact(table, rows)}
        for row in rows:
            if row._mapping[column.name] not in whole:
                connection.execute(delete(table).where(column == row._mapping[column.name]))
