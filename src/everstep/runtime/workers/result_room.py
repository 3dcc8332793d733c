"""Result room: bounds the bytes of large results that workers have sent and nobody has recorded."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from everstep.spool import Spool

MAX_RESULT_BYTES = 512 << 20
"""Of large results that are held at a time. One alone may be larger."""
_MIN_TAKEN_BYTES = 8 << 20
"""By a smaller result as well, which bounds the number of results and of their descriptors."""


class ResultRoom:
    """Room for large results. Others wait in their workers.

    Must be created on a running event loop.

    Args:
        limit: bytes that are held at a time.

    Attributes:
        held: bytes that are held.
    """

    def __init__(self, limit: int = MAX_RESULT_BYTES) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._freed = asyncio.Event()
        self.held = 0

    async def spool(self, size: int) -> Spool:
        """Wait until a result of some bytes may be held, and return the spool that takes it."""
        size = max(size, _MIN_TAKEN_BYTES)
        while self.held and self.held + size > self._limit:
            self._freed.clear()
            await self._freed.wait()
        self.held += size
        return _Held(self, size)

    def free(self, size: int) -> None:
        """Let go of bytes. May be called from any thread."""
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size
        self._freed.set()


class _Held(Spool):
    """A spool that takes room until it is closed."""

    def __init__(self, room: ResultRoom, size: int) -> None:
        super().__init__()
        self._room = room
        self._taken = size

    def close(self) -> None:
        """Free the bytes, and the room."""
        super().close()
        taken, self._taken = self._taken, 0
        if taken:
            self._room.free(taken)

    def __del__(self) -> None:
        self.close()
