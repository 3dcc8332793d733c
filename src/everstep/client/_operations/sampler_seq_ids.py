"""Sequence ids of samples: each client of a sampler has its own block."""

from __future__ import annotations

import asyncio
import itertools
import uuid

from everstep.client._transport.session import Session
from everstep.wire import types

_BLOCK_SIZE = 1_000_000_000


class SamplerSeqIds:
    """The sequence ids of one client of a sampler.

    Args:
        holder: the session.
        sampling_session_id: the sampler.
        shadow: whether the client is a copy. The client that created the sampler has block 0.
    """

    def __init__(self, holder: Session, sampling_session_id: str, *, shadow: bool) -> None:
        self._holder = holder
        self._sampler_id = sampling_session_id
        self._shadow = shadow
        self._counter = itertools.count()
        self._joining: asyncio.Task[int] | None = None

    def next(self) -> int:
        """Return the next index in the block. Called in the caller's thread."""
        return next(self._counter)

    async def seq_id(self, index: int) -> int:
        """Return an index's sequence id. A copy's first call asks the service for its block."""
        if not self._shadow:
            return index
        if self._joining is None:
            self._joining = asyncio.create_task(self._join())
        return await asyncio.shield(self._joining) * _BLOCK_SIZE + index

    async def _join(self) -> int:
        await self._holder.connection.configured()
        if not self._holder.config.sample_join_sampling_session:
            return uuid.uuid4().int % _BLOCK_SIZE + 1
        request = types.JoinSamplingSessionRequest(sampling_session_id=self._sampler_id)
        answer = await self._holder.http.call(
            "POST",
            "/join_sampling_session",
            types.JoinSamplingSessionResponse,
            json=request.model_dump(mode="json"),
        )
        return answer.client_counter
