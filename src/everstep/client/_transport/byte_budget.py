"""Byte budgets: bound the bytes that a client has in flight, as the service's flags ask."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from everstep.wire import types

_BYTES_PER_TOKEN = 10
"""Approximate size of a prompt's token in JSON."""


class ByteBudget:
    """A number of bytes, reserved in the order of the requests, on the client's event loop.

    Args:
        total: size of the budget. A larger reservation gets the whole budget, alone.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold a number of bytes, waiting until they are free."""
        size = max(0, min(size, self._total))
        if not self._waiting and size <= self._free:
            self._free -= size
        else:
            await self._wait(size)
        try:
            yield
        finally:
            self._release(size)

    async def _wait(self, size: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._release(0)  # requests behind it may fit
            else:
                self._release(size)  # it was granted at the same moment
            raise

    def _release(self, size: int) -> None:
        self._free += size
        while self._waiting:
            wanted, waiter = self._waiting[0]
            if not waiter.cancelled():
                if wanted > self._free:
                    return
                self._free -= wanted
                waiter.set_result(None)
            self._waiting.popleft()


@dataclass(frozen=True)
class Budgets:
    """The budgets that the clients of one connection share.

    Attributes:
        passes: bytes of training passes that are being sent.
        samples: bytes of prompts that are being sent.
        responses: bytes of large results that are being fetched.
    """

    passes: ByteBudget
    samples: ByteBudget
    responses: ByteBudget

    @classmethod
    def of(cls, config: types.ClientConfigResponse) -> Budgets:
        """Create budgets of the sizes in the service's flags."""
        return cls(
            passes=ByteBudget(config.fwdbwd_dispatch_bytes_semaphore_size),
            samples=ByteBudget(config.sample_dispatch_bytes_semaphore_size),
            responses=ByteBudget(config.inflight_response_bytes_semaphore_size),
        )


def prompt_bytes(prompt: types.ModelInput) -> int:
    """Estimate the size of a prompt in a request."""
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
