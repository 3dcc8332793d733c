"""Joined writes: the head and the body of a response in one write.

Uvicorn writes them one after the other. As two segments they cost a second system call, and wake
the client twice.
"""

from __future__ import annotations

import asyncio
from typing import Any

_MAX_HELD_BYTES = 64 << 10


class JoinedWrites(asyncio.Transport):
    """A transport that writes what it is given in one turn of the event loop at the next.

    At most `_MAX_HELD_BYTES` are held. Larger data is written at once, so that the transport's flow
    control sees it.

    Args:
        transport: the connection's.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._size = 0

    def write(self, data: Any) -> None:
        """Write data, soon."""
        if len(data) > _MAX_HELD_BYTES:  # not worth a copy
            self._flush()
            self._transport.write(data)
            return
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._size += len(data)
        if self._size > _MAX_HELD_BYTES:
            self._flush()

    def close(self) -> None:
        """Close the connection when everything is written."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._held.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        """Return whether the connection is closing or closed."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """Receive nothing until `resume_reading`."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Receive again."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a property of the connection."""
        return self._transport.get_extra_info(name, default)

    def _flush(self) -> None:
        held, self._held, self._size = self._held, [], 0
        if held:
            self._transport.write(b"".join(held))
