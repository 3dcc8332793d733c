"""Piecewise responses: large bodies are written while others are served."""

from __future__ import annotations

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
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        body = memoryview(self.body)
        for at in range(0, len(body), PIECE_BYTES):
            piece, more = body[at : at + PIECE_BYTES], at + PIECE_BYTES < len(body)
            await send({"type": "http.response.body", "body": piece, "more_body": more})
