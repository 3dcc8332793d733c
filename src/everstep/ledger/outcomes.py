"""Outcomes: record how an operation ended, with everything that it created, in one transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete

from everstep.ledger import audit
from everstep.ledger import operation_rows as rows
from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.payload_log.content import Content
from everstep.ledger.records import Checkpoint, Event, Operation, Sampler
from everstep.ledger.samples import put_sampler


def succeed(
    connection: Connection,
    request_id: str,
    result: Content,
    media: str,
    *,
    checkpoint: Checkpoint | None,
    sampler: Sampler | None,
    seconds: float,
    environment: dict[str, Any] | None,
    prune: bool,
    event: Event | None,
) -> Operation:
    """Record that an operation succeeded. See `Ledger.succeed`."""
    finished, ended = rows.finish(
        connection,
        request_id,
        status="succeeded",
        result=result,
        media=media,
        seconds=seconds,
        prune=prune,
    )
    if ended and checkpoint is not None:
        q.put(connection, t.checkpoints, checkpoint)
    if ended and sampler is not None:
        put_sampler(connection, sampler)
    if ended and environment is not None:
        q.update_run(connection, finished.scope, environment=environment)
    if ended:
        audit.record(connection, event)
    return finished


def fail(connection: Connection, request_id: str, message: str, category: str) -> Operation:
    """Record that an operation failed. A run whose creation failed is removed."""
    failed, ended = rows.finish(
        connection, request_id, status="failed", error=message, category=category
    )
    if ended and failed.seq_id == 0:
        connection.execute(delete(t.runs).where(t.runs.c.run_id == failed.scope))
    return failed
