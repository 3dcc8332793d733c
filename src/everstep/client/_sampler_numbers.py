"""Sequence ids of samples: each client of a sampler has a block of its own."""

from __future__ import annotations

import asyncio
import itertools
import uuid

from everstep.client._session import Session
from everstep.wire import types

_BLOCK = 1_000_000_000


class SamplerNumbers:
    """The sequence ids of one client of a sampler.

    Args:
        holder: the session.
        sampling_session_id: the sampler.
        shadow: whether the client is a copy; the one that made the sampler has the first block.
    """

    def __init__(self, holder: Session, sampling_session_id: str, *, shadow: bool) -> None:
        self._holder = holder
        self._sampler_id = sampling_session_id
        self._shadow = shadow
        self._counter = itertools.count()
        self._joining: asyncio.Task[int] | None = None

    def next(self) -> int:
        """The next number in the block; taken in the caller's thread."""
        return next(self._counter)

    async def seq_id(self, number: int) -> int:
        """The sequence id of a number; the first time a copy asks the service for its block."""
        if not self._shadow:
            return number
        if self._joining is None:
            self._joining = asyncio.create_task(self._join())
        return await asyncio.shield(self._joining) * _BLOCK + number

    async def _join(self) -> int:
        await self._holder.connection.configured()
        if not self._holder.config.sample_join_sampling_session:
            return uuid.uuid4().int % _BLOCK + 1
        request = types.JoinSamplingSessionRequest(sampling_session_id=self._sampler_id)
        answer = await self._holder.http.call(
            "POST",
            "/join_sampling_session",
            types.JoinSamplingSessionResponse,
            json=request.model_dump(mode="json"),
        )
        return answer.client_counter
