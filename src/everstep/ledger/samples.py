"""Samples and samplers: who samples, with which weights, what has ended and was retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, Connection, func, select

from everstep.ledger import queries as q
from everstep.ledger import seals
from everstep.ledger import tables as t
from everstep.ledger.records import Sampler
from everstep.ledger.writer import Writer

_DROPPED_AT_ONCE = 500


@dataclass(frozen=True)
class Completion:
    """A sample that has ended.

    Attributes:
        number: counts the ends in its sampler, from 1, in their order.
        request_id: its future.
        failed: whether it failed.
        size: bytes of its result.
    """

    number: int
    request_id: str
    failed: bool
    size: int


class Samples:
    """What the ledger tells of samples; every method returns when its writes are durable."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def join(self, sampler_id: str) -> int | None:
        """Count another client of a sampler, for good; its number, None: there is no sampler."""

        def work(connection: Connection) -> int | None:
            sampler = q.one(connection, Sampler, t.samplers, sampler_id)
            if sampler is None:
                return None
            number = (sampler.clients or 0) + 1
            mine = t.samplers.c.sampler_id == sampler_id
            seals.change(connection, t.samplers, mine, clients=number)
            return number

        return await self._writer.run(work)

    async def completions(
        self, sampler_id: str, places: range, after: int, limit: int
    ) -> list[Completion]:
        """The samples that have ended, in that order, those with a number up to ``after`` left out.

        Args:
            sampler_id: whose.
            places: which sequence ids: those of one client.
            after: the last number that is not wanted.
            limit: how many at most.
        """
        columns = t.operations.c
        wanted = (columns.completion, columns.request_id, columns.status == "failed")
        query = (
            select(*wanted, func.coalesce(func.length(columns.result), 0))
            .where(*_of(sampler_id, places), columns.completion > after)
            .order_by(columns.completion)
            .limit(limit)
        )
        return await self._writer.run(lambda c: [Completion(*row) for row in c.execute(query)])

    async def drop(self, sampler_id: str, places: range, request_ids: Sequence[str]) -> None:
        """Drop results that their client says it has; what isn't there is no error."""
        for begin in range(0, len(request_ids), _DROPPED_AT_ONCE):
            part = request_ids[begin : begin + _DROPPED_AT_ONCE]
            await self._drop(sampler_id, places, part)

    async def _drop(self, sampler_id: str, places: range, request_ids: Sequence[str]) -> None:
        columns = t.operations.c
        named = columns.request_id.in_(request_ids)
        query = select(columns.request_id, columns.media).where(
            *_of(sampler_id, places),
            named,
            columns.status == "succeeded",
            columns.retrieved.is_(None),
        )

        def work(connection: Connection) -> None:
            for request_id, media in connection.execute(query).all():
                digest = q.result_digest(request_id, "succeeded", None, media, None, None)
                values = {"result": None, "retrieved": True, "result_digest": digest}
                seals.change(connection, t.operations, columns.request_id == request_id, **values)

        await self._writer.run(work)


def put_sampler(connection: Connection, sampler: Sampler) -> None:
    """Insert a sampler; an inflight one takes all of its run's along to its weights."""
    if sampler.inflight_run is not None:
        mine = t.samplers.c.inflight_run == sampler.inflight_run
        newest = select(t.samplers).where(mine).order_by(t.samplers.c.weights_position.desc())
        known = connection.execute(newest.limit(1)).one_or_none()
        if known is not None and known.weights_position > (sampler.weights_position or 0):
            position = known.weights_position
            sampler = replace(sampler, model_path=known.model_path, weights_position=position)
        moved = {"model_path": sampler.model_path, "weights_position": sampler.weights_position}
        seals.change(connection, t.samplers, mine, **moved)
    q.put(connection, t.samplers, sampler)


def _of(sampler_id: str, places: range) -> tuple[ColumnElement[bool], ...]:
    columns = t.operations.c
    here = columns.scope == sampler_id
    return here, columns.place >= places.start, columns.place < places.stop
