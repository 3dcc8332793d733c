"""Byte budget: bounds the bytes of large bodies that the service holds at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from everstep.runtime import Rejected

_MIN_RESERVED_BYTES = 8 << 20
"""Of a small body as well, which bounds the number of bodies and of their descriptors."""
_MAX_WAITING = 256
_MAX_SECONDS = 60.0
_REFUSED = "The service holds as many large requests as it can; try again."


class ByteBudget:
    """Bytes that can be reserved, in the order of the requests for them.

    Args:
        limit: the bytes that can be reserved at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Wait for room for some bytes, and hold it within the block.

        Raises:
            Rejected: too many wait for room, or it took too long (503).
        """
        size = min(max(size, _MIN_RESERVED_BYTES), self._limit)
        await self._acquire(size)
        try:
            yield
        finally:
            self._free += size
            self._admit()

    async def _acquire(self, size: int) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            raise Rejected(503, _REFUSED)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._admit()
        try:
            async with asyncio.timeout(_MAX_SECONDS):
                await turn
        except TimeoutError as error:
            self._give_up(size, turn)
            raise Rejected(503, _REFUSED) from error
        except asyncio.CancelledError:
            self._give_up(size, turn)
            raise

    def _give_up(self, size: int, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self._free += size
        turn.cancel()
        self._admit()

    def _admit(self) -> None:
        """Let those in that have room, in order."""
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.cancelled():
                if size > self._free:
                    return
                self._free -= size
                turn.set_result(None)
            self._waiting.popleft()
