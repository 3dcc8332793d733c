"""The index of checkpoints as upkeep sees it: also what is expired, quarantined or unlisted."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import Connection, delete, select

from everstep.ledger import queries as q
from everstep.ledger import seals
from everstep.ledger import tables as t
from everstep.ledger.records import Checkpoint, Operation, Run


def every_checkpoint(connection: Connection) -> list[Checkpoint]:
    """All rows of the index, by path."""
    query = select(t.checkpoints).order_by(t.checkpoints.c.path)
    rows = seals.intact(t.checkpoints, connection.execute(query))
    return [q.record(Checkpoint, row) for row in rows]


def is_indexed(connection: Connection, path: str) -> bool:
    """Whether a checkpoint has a row, be it expired, quarantined or unlisted."""
    query = select(t.checkpoints.c.path).where(t.checkpoints.c.path == path)
    return connection.execute(query).first() is not None


def expired(connection: Connection, before: datetime) -> list[Checkpoint]:
    """Checkpoints that had expired at a time, the longest expired first."""
    expires = t.checkpoints.c.expires_at
    query = select(t.checkpoints).where(expires <= before).order_by(expires, t.checkpoints.c.path)
    rows = seals.intact(t.checkpoints, connection.execute(query))
    return [q.record(Checkpoint, row) for row in rows]


def pending(connection: Connection, kinds: Iterable[str]) -> list[Operation]:
    """Operations of some kinds that have not ended."""
    here = (t.operations.c.status == "pending", t.operations.c.kind.in_(list(kinds)))
    return q.operations_where(connection, *here)


def set_quarantined(connection: Connection, paths: Iterable[str]) -> int:
    """Make exactly these checkpoints the quarantined ones; returns how many rows changed."""
    wanted = set(paths)
    changed = 0
    for each in every_checkpoint(connection):
        if each.quarantined != (each.path in wanted):
            mine = t.checkpoints.c.path == each.path
            seals.change(connection, t.checkpoints, mine, quarantined=not each.quarantined)
            changed += 1
    return changed


def recreate(
    connection: Connection, runs: Iterable[Run], checkpoints: Iterable[Checkpoint]
) -> tuple[int, int]:
    """Insert the runs and checkpoints that aren't there and were not deleted.

    Returns:
        How many runs and how many checkpoints were inserted.
    """
    drop_damaged(connection)
    known_runs = set(connection.execute(select(t.runs.c.run_id)).scalars())
    known = set(connection.execute(select(t.checkpoints.c.path)).scalars())
    known.update(connection.execute(select(t.deleted_checkpoints.c.path)).scalars())
    new_runs = [vars(run) for run in runs if run.run_id not in known_runs]
    new = [vars(each) for each in checkpoints if each.path not in known]
    for table, rows in ((t.runs, new_runs), (t.checkpoints, new)):
        for row in rows:
            seals.add(connection, table, row)
    return len(new_runs), len(new)


def drop_damaged(connection: Connection) -> None:
    """Remove what is damaged of that which manifests know as well."""
    for table in (t.runs, t.checkpoints):
        column = next(iter(table.primary_key.columns))
        rows = connection.execute(select(table)).all()
        whole = {row._mapping[column.name] for row in seals.intact(table, rows)}
        for row in rows:
            if row._mapping[column.name] not in whole:
                connection.execute(delete(table).where(column == row._mapping[column.name]))
