"""HTTP by httptools, with the bounds that h11 has and httptools leaves to its user."""

from __future__ import annotations

import asyncio
import http

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from everstep.server.protocols.joined_writes import JoinedWrites
from everstep.server.protocols.malformed import MAX_HEAD_BYTES, malformed_answer


class _Unacceptable(Exception):
    """The parser may go on, and the request is refused all the same."""


class HttptoolsProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, with one write an answer and bounds for what a request may hold.

    Uvicorn answers an exception of a parser's callback as malformed HTTP.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        self._in_head = True
        self._head_bytes = 0
        self._unread_bytes = 0
        super().connection_made(JoinedWrites(transport))

    def data_received(self, data: bytes) -> None:
        """Parse what a client sent.

        The parser collects an unfinished header or trailer of any length. The bytes since its last
        callback are bounded as well.
        """
        self._unread_bytes += len(data)
        before = self._unread_bytes
        super().data_received(data)
        if self._unread_bytes == before > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the request's target."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header. Trailers are dropped: routes read headers only."""
        self._unread_bytes = 0
        if self._in_head:
            self._count(name, value)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Call the application, for a request with one host, as HTTP/1.1 demands."""
        self._unread_bytes = 0
        self._in_head = False
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise _Unacceptable(f"{hosts} Host headers")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self._unread_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that can't be read, such as one with a NUL in a header, and hang up.

        A request before it that is whole is answered first, and its answer is the last one.
        """
        cycle = self.cycle
        if cycle is not None and not (cycle.response_complete or cycle.more_body):
            cycle.keep_alive = False
            self.flow.pause_reading()
            return
        if self.pipeline or (
            cycle is not None and cycle.response_started > cycle.response_complete
        ):
            self.transport.close()  # in the midst of an answer
            return
        headers, body = malformed_answer()
        lines = [f"HTTP/1.1 400 {http.HTTPStatus.BAD_REQUEST.phrase}\r\n".encode()]
        lines += [b"%s: %s\r\n" % header for header in headers]
        self.transport.write(b"".join([*lines, b"\r\n", body]))
        self.transport.close()

    def _count(self, *parts: bytes) -> None:
        """Bound a head, whose parts the parser reports as they come."""
        self._head_bytes += sum(map(len, parts))
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _Unacceptable(f"a head of more than {MAX_HEAD_BYTES} bytes")
