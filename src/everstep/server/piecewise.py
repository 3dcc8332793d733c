"""Piecewise responses: large bodies are written while others are served."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AsyncExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE_BYTES = 256 << 10


class PiecewiseResponse(Response):
    """A response whose body is sent in pieces, the next one when the client has read enough.

    Without it the whole body would be handed to the connection, and copied, in one callback.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        if len(self.body) <= PIECE_BYTES:
            await super().__call__(scope, receive, send)
            return
        body = memoryview(self.body)
        pieces = (body[at : at + PIECE_BYTES] for at in range(0, len(body), PIECE_BYTES))
        await _send(self, pieces, len(body), send)


class FileResponse(Response):
    """A response whose body is read from a file while it is sent, a piece at a time.

    Args:
        descriptor: of the file.
        offset: where the body begins.
        size: bytes of the body.
        media_type: its type.
        held: closed when the response is sent, or the client is gone.
    """

    def __init__(
        self, descriptor: int, offset: int, size: int, media_type: str, held: AsyncExitStack
    ) -> None:
        super().__init__(headers={"content-length": str(size)}, media_type=media_type)
        self._descriptor = descriptor
        self._offset = offset
        self._size = size
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        async with self._held:
            await _send(self, self._pieces(), self._size, send)

    def _pieces(self) -> Iterator[bytes]:
        for at in range(0, self._size, PIECE_BYTES):
            size = min(PIECE_BYTES, self._size - at)
            piece = os.pread(self._descriptor, size, self._offset + at)
            if len(piece) < size:
                raise EOFError(f"a file ends within the body of a response, at {at} bytes")
            yield piece


async def _send(
    response: Response, pieces: Iterator[bytes | memoryview], size: int, send: Send
) -> None:
    start = {"status": response.status_code, "headers": response.raw_headers}
    await send({"type": "http.response.start", **start})
    sent = 0
    for piece in pieces:
        sent += len(piece)
        await send({"type": "http.response.body", "body": piece, "more_body": sent < size})
