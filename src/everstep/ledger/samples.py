"""Samples: clients and weights of samplers, and the samples that have ended or were retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, Connection, func, select

from everstep.ledger import queries as q
from everstep.ledger import tables as t
from everstep.ledger.memory import Memory
from everstep.ledger.payload_log.content import location_columns
from everstep.ledger.payload_log.contents import Contents
from everstep.ledger.recorded_samples import RecordedSamples
from everstep.ledger.records import Sampler
from everstep.ledger.sqlite import row_checksums
from everstep.ledger.store import Store

_DROPPED_AT_ONCE = 500


@dataclass(frozen=True)
class Completion:
    """A sample that has ended.

    Attributes:
        number: its position in the order in which the sampler's samples ended, from 1.
        request_id: its future.
        failed: whether it failed.
        size: the size of its result in bytes.
    """

    number: int
    request_id: str
    failed: bool
    size: int


class Samples:
    """Queries and changes of samples. Every method returns when its writes are durable.

    Args:
        store: the database.
        memory: keeps the samples that have ended.
        contents: keeps large requests and results.

    Attributes:
        recorded: tokens and logprobs of samples, for the passes that train on them.
    """

    def __init__(self, store: Store, memory: Memory, contents: Contents) -> None:
        self._store = store
        self._contents = contents
        self.recorded = RecordedSamples(store, memory, contents)

    async def add_client(self, sampler_id: str) -> int | None:
        """Add a client to a sampler and return its number, or None if there is no sampler."""

        def work(connection: Connection) -> int | None:
            sampler = q.one(connection, Sampler, t.samplers, sampler_id)
            if sampler is None:
                return None
            number = (sampler.clients or 0) + 1
            mine = t.samplers.c.sampler_id == sampler_id
            row_checksums.update(connection, t.samplers, mine, clients=number)
            return number

        return await self._store.run(work)

    async def completions(
        self, sampler_id: str, seq_ids: range, after: int, limit: int
    ) -> list[Completion]:
        """Return the samples that have ended, in the order of their ends.

        Args:
            sampler_id: the sampler.
            seq_ids: the sequence ids of one client.
            after: return only completions with a greater number.
            limit: the maximum number of completions.
        """
        columns = t.operations.c
        wanted = (columns.completion, columns.request_id, columns.status == "failed")
        query = (
            select(*wanted, func.coalesce(columns.result_size, func.length(columns.result), 0))
            .where(*_of(sampler_id, seq_ids), columns.completion > after)
            .order_by(columns.completion)
            .limit(limit)
        )
        return await self._store.read(lambda c: [Completion(*row) for row in c.execute(query)])

    async def drop_results(
        self, sampler_id: str, seq_ids: range, request_ids: Sequence[str]
    ) -> None:
        """Drop results that their client has confirmed. An unknown request id is no error."""
        for begin in range(0, len(request_ids), _DROPPED_AT_ONCE):
            part = request_ids[begin : begin + _DROPPED_AT_ONCE]
            await self._drop_page(sampler_id, seq_ids, part)

    async def _drop_page(self, sampler_id: str, seq_ids: range, request_ids: Sequence[str]) -> None:
        columns = t.operations.c
        named = columns.request_id.in_(request_ids)
        query = select(columns.request_id, columns.media, columns.result_segment).where(
            *_of(sampler_id, seq_ids),
            named,
            columns.status == "succeeded",
            columns.retrieved.is_(None),
        )

        def work(connection: Connection) -> set[int]:
            segments = set()
            for request_id, media, segment in connection.execute(query).all():
                digest = q.result_digest(request_id, "succeeded", None, media, None, None)
                values = {"result": None, "retrieved": True, "result_digest": digest}
                values |= location_columns("result", None)
                segments |= {segment} if segment is not None else set()
                row_checksums.update(
                    connection, t.operations, columns.request_id == request_id, **values
                )
            return segments

        if segments := await self._store.run(work):
            self._contents.release(segments)


def put_sampler(connection: Connection, sampler: Sampler) -> None:
    """Insert a sampler. An inflight one moves all inflight samplers of its run to its weights.

    If one of them has newer weights already, the new sampler gets those.
    """
    if sampler.inflight_run is not None:
        mine = t.samplers.c.inflight_run == sampler.inflight_run
        newest = select(t.samplers).where(mine).order_by(t.samplers.c.weights_position.desc())
        known = connection.execute(newest.limit(1)).one_or_none()
        if known is not None and known.weights_position > (sampler.weights_position or 0):
            position = known.weights_position
            sampler = replace(sampler, model_path=known.model_path, weights_position=position)
        moved = {"model_path": sampler.model_path, "weights_position": sampler.weights_position}
        row_checksums.update(connection, t.samplers, mine, **moved)
    q.put(connection, t.samplers, sampler)


def _of(sampler_id: str, seq_ids: range) -> tuple[ColumnElement[bool], ...]:
    columns = t.operations.c
    here = columns.scope == sampler_id
    return here, columns.place >= seq_ids.start, columns.place < seq_ids.stop
