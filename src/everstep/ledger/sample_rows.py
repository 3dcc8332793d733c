"""Statements on recorded samples, each one unit of a transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, select

from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerDamaged
from everstep.ledger.records import RecordedSample
from everstep.ledger.sqlite import row_checksums

REMOVED_AT_ONCE = 200


def recorded_sample(row: Row[Any]) -> RecordedSample:
    """Convert a row to its record, raising `LedgerDamaged` if it is damaged."""
    row_checksums.check(t.recorded_samples, row)
    values = dict(row._mapping)
    written = values.pop("digest")
    del values["seal"]
    found = RecordedSample(**values)
    if written != _digest(found):
        raise LedgerDamaged(
            f"The record of sample {found.request_id} is damaged: the database does not hold what "
            "was written. Draw the sample again."
        )
    return found


def put(connection: Connection, sample: RecordedSample) -> None:
    """Insert a record, which counts as used now."""
    values = {**asdict(sample), "digest": _digest(sample), "last_used_at": datetime.now(UTC)}
    row_checksums.insert(connection, t.recorded_samples, values)


def restart_retention(connection: Connection, request_ids: Iterable[str]) -> None:
    """Note that records are used now. One that is gone is no error."""
    moment = datetime.now(UTC)
    for request_id in request_ids:
        mine = t.recorded_samples.c.request_id == request_id
        row_checksums.touch(connection, t.recorded_samples, mine, last_used_at=moment)


def remove_unused(connection: Connection, since: datetime) -> int:
    """Remove up to a batch of records that were not used since a time, and return how many."""
    columns = t.recorded_samples.c
    old = select(columns.request_id).where(columns.last_used_at < since).limit(REMOVED_AT_ONCE)
    found = connection.scalars(old).all()
    connection.execute(delete(t.recorded_samples).where(columns.request_id.in_(found)))
    return len(found)


def _digest(sample: RecordedSample) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (sample.request_id.encode(), sample.prompt, sample.sequences):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
