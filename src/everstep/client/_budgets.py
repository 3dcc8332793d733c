"""Budgets of bytes: how much a client has under way at a time, as the service asks for."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from everstep.wire import types
from everstep.wire.responses import ClientConfigResponse

_BYTES_PER_TOKEN = 10
"""Of a prompt in JSON, about."""


class ByteBudget:
    """So many bytes, reserved in the order of asking; used on the client's loop only.

    Args:
        total: of the budget. What is larger gets it all, alone.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold so many bytes; waits until they are free."""
        size = max(0, min(size, self._total))
        if not self._waiting and size <= self._free:
            self._free -= size
        else:
            await self._wait(size)
        try:
            yield
        finally:
            self._give_back(size)

    async def _wait(self, size: int) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._give_back(0)  # those behind it may fit
            else:
                self._give_back(size)  # it was granted in the same moment
            raise

    def _give_back(self, size: int) -> None:
        self._free += size
        while self._waiting:
            wanted, place = self._waiting[0]
            if not place.cancelled():
                if wanted > self._free:
                    return
                self._free -= wanted
                place.set_result(None)
            self._waiting.popleft()


@dataclass(frozen=True)
class Budgets:
    """What the clients of one connection share.

    Attributes:
        passes: bytes of training passes that are being sent.
        samples: bytes of prompts that are being sent.
        responses: bytes of large results that are being fetched.
    """

    passes: ByteBudget
    samples: ByteBudget
    responses: ByteBudget

    @classmethod
    def of(cls, config: ClientConfigResponse) -> Budgets:
        """As large as the service's flags say."""
        return cls(
            passes=ByteBudget(config.fwdbwd_dispatch_bytes_semaphore_size),
            samples=ByteBudget(config.sample_dispatch_bytes_semaphore_size),
            responses=ByteBudget(config.inflight_response_bytes_semaphore_size),
        )


def prompt_bytes(prompt: types.ModelInput) -> int:
    """About as many bytes as a prompt takes in a request."""
    return sum(_chunk_bytes(chunk) for chunk in prompt.chunks)


def _chunk_bytes(chunk: types.ModelInputChunk) -> int:
    match chunk:
        case types.ImageChunk():
            return len(chunk.data)
        case types.DmelChunk():
            return len(chunk.dmel)
        case types.ImageAssetPointerChunk():
            return len(chunk.location)
    return _BYTES_PER_TOKEN * chunk.length
