"""Recorded samples: tokens and logprobs of samples, for the passes that train on them later.

A sample is recorded in the transaction that records its success. A pass that reads it is accepted
with the values inside, so its replay needs no record. Accepting it restarts the record's retention.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, select

from everstep.ledger import operation_rows, sample_rows
from everstep.ledger import tables as t
from everstep.ledger.memory import Memory
from everstep.ledger.payload_log.contents import Contents
from everstep.ledger.records import Operation, RecordedSample
from everstep.ledger.store import Store

_READ_AT_ONCE = 500


class RecordedSamples:
    """Records samples, reads them and removes old ones. Durable when a call returns."""

    def __init__(self, store: Store, memory: Memory, contents: Contents) -> None:
        self._store = store
        self._memory = memory
        self._contents = contents

    async def succeed(
        self, request_id: str, result: bytes, *, seconds: float, recorded: RecordedSample | None
    ) -> Operation:
        """Record that a sample succeeded, and keep its values for training in one transaction.

        Args:
            request_id: the sample. One that has ended already stays as it is.
            result: the value that its future resolves to.
            seconds: how long its execution took.
            recorded: what to keep for training, if its client asked for that.
        """
        content = await self._contents.result(result)

        def work(connection: Connection) -> Operation:
            finished, ended = operation_rows.finish(
                connection,
                request_id,
                status="succeeded",
                result=content,
                media="protobuf",
                seconds=seconds,
                prune=True,
            )
            if ended and recorded is not None:
                sample_rows.put(connection, recorded)
            return finished

        return await self._contents.finish(content, work, self._memory.finished)

    async def read(self, request_ids: Sequence[str]) -> dict[str, RecordedSample]:
        """Return the records of samples, by request id. Samples without a record are left out.

        Raises:
            LedgerDamaged: a record is damaged.
        """
        table = t.recorded_samples

        def work(connection: Connection) -> dict[str, RecordedSample]:
            found = {}
            for begin in range(0, len(request_ids), _READ_AT_ONCE):
                part = request_ids[begin : begin + _READ_AT_ONCE]
                for row in connection.execute(select(table).where(table.c.request_id.in_(part))):
                    found[row.request_id] = sample_rows.recorded_sample(row)
            return found

        return await self._store.read(work)

    async def remove_unused(self, since: datetime) -> int:
        """Remove the records that were not used since a time, and return their number."""
        total = 0
        while True:  # in small transactions, because other calls wait for the thread
            removed = await self._store.run(lambda c: sample_rows.remove_unused(c, since))
            total += removed
            if removed < sample_rows.REMOVED_AT_ONCE:
                return total
