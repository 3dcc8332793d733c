"""HTTP by h11, where httptools is not installed."""

from __future__ import annotations

import asyncio
import http

import h11
from uvicorn.protocols.http import h11_impl

from everstep.server.protocols.joined_writes import JoinedWrites
from everstep.server.protocols.malformed import malformed_answer


class H11Protocol(h11_impl.H11Protocol):
    """Uvicorn's protocol, with one write an answer and an answer in JSON to malformed HTTP."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(JoinedWrites(transport))

    def send_400_response(self, msg: str) -> None:
        """Answer a request that can't be read, such as one with a NUL in a header, and hang up."""
        headers, body = malformed_answer()
        reason = http.HTTPStatus.BAD_REQUEST.phrase.encode()
        head = h11.Response(status_code=400, headers=headers, reason=reason)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
