"""One HTTP/1.1 connection, with one request at a time."""

from __future__ import annotations

import asyncio
import select

import httptools
import httpx

from everstep.client._transport.direct import FOLLOWING
from everstep.wire.codecs.followed import FOLLOWED, split_accepted

_MAX_HEAD_BYTES = 100 * 1024
_MAX_JOINED_BYTES = 64 * 1024
"""Size up to which a body is copied behind its head, so that both are one write."""
_FRAMING = (b"content-length", b"transfer-encoding")
_FOLLOWED = (b"content-type", FOLLOWED.encode())


class Connection(asyncio.Protocol):
    """A connection that was opened by `asyncio.loop.create_connection`.

    Args:
        loop: the running loop.

    Attributes:
        used: time of the loop at which something came or was sent.
        is_reusable: whether the last response allows another request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.used = loop.time()
        self.is_reusable = False
        self._loop = loop
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle
        self._readable = select.poll()
        self._parser = httptools.HttpResponseParser(self)
        self._response: asyncio.Future[httpx.Response] | None = None
        self._following: asyncio.Future[bytes] | None = None
        self._seconds = 0.0
        self._unsent = 0
        self._reset()

    def _reset(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._has_head = False
        self._is_followed = False
        self._unread_bytes = 0

    # Used by the pool

    async def exchange(self, head: bytes, body: bytes, seconds: float) -> httpx.Response:
        """Send a request and wait for its response. If that fails, the connection is closed.

        A response whose media type is `FOLLOWED` is returned with its first part. Its extensions
        have a future of the second part, and the connection is in use until then.

        Args:
            head: the request's first line and header fields.
            body: as long as the head says.
            seconds: bound on the time in which nothing is sent and nothing comes.

        Raises:
            httpx.RequestError: there was no response, or only a part of it.
        """
        response: asyncio.Future[httpx.Response] = self._loop.create_future()
        self._response = response
        self._seconds, self.used, self.is_reusable = seconds, self._loop.time(), False
        if len(body) <= _MAX_JOINED_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        self._unsent = self._transport.get_write_buffer_size()
        self._timer = self._loop.call_later(seconds, self._check_silence)
        try:
            return await response
        except BaseException:
            self.is_reusable = False
            if self._following is not None:
                self._following.cancel()
            raise
        finally:
            self._response = None
            if self._following is None:
                self._end()

    def _end(self) -> None:
        self._timer.cancel()
        if not self.is_reusable:
            self.close()

    def is_open(self) -> bool:
        """Return whether another request can be sent: nothing came since, not even the end."""
        return not (self._transport.is_closing() or self._readable.poll(0))

    def close(self) -> None:
        """Close the connection."""
        self._transport.abort()

    # Called by asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        self._transport = transport
        self._readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Parse a part of a response. What comes without a request ends the connection.

        The parser collects an unfinished header field or trailer of any length, so the bytes
        outside of a body are bounded here.
        """
        if self._is_idle():
            self.is_reusable = False
            self.close()
            return
        self.used = self._loop.time()
        self._unread_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(httpx.RemoteProtocolError(str(error)))
            return
        if self._unread_bytes > _MAX_HEAD_BYTES:
            self._fail(httpx.RemoteProtocolError("the response's header fields don't end"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request in progress, unless its body ends with the connection."""
        self.is_reusable = False
        if exc is not None:
            self._fail(httpx.ReadError(str(exc)))
        elif not self._has_head:
            self._fail(httpx.RemoteProtocolError("Server disconnected without sending a response."))
        elif any(name in _FRAMING for name, _ in self._headers):
            self._fail(httpx.RemoteProtocolError("the connection was closed before the body's end"))
        else:
            self._finish()

    # Called by the parser

    def on_message_begin(self) -> None:
        """Begin a response. One that nobody asked for makes the connection useless."""
        if self._is_idle():
            self.is_reusable = False
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header field. Trailers are dropped."""
        if not self._has_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Note that the body begins."""
        self._has_head = True
        self._unread_bytes = 0
        self._is_followed = _FOLLOWED in self._headers

    def on_body(self, part: bytes) -> None:
        """Collect a part of the body."""
        self._body.append(part)
        self._unread_bytes = 0
        if self._is_followed and self._following is None and not self._is_idle():
            self._begin_following()

    def on_message_complete(self) -> None:
        """Finish the request. Informational responses are skipped."""
        if self._is_idle():
            return
        if self._parser.get_status_code() < 200:
            self._reset()
            return
        is_sent = self._transport.get_write_buffer_size() == 0
        self.is_reusable = is_sent and self._parser.should_keep_alive()
        self._finish()

    def _is_idle(self) -> bool:
        waits = self._following or self._response
        return waits is None or waits.done()

    def _begin_following(self) -> None:
        """Return the response, if its first part is whole."""
        parts = split_accepted(b"".join(self._body))
        if parts is None or self._response is None:
            return
        accepted, rest = parts
        self._body = [rest]
        self._following = self._loop.create_future()
        self._following.add_done_callback(self._end_following)
        self._response.set_result(
            httpx.Response(
                self._parser.get_status_code(),
                content=accepted,
                extensions={FOLLOWING: self._following},
            )
        )

    def _end_following(self, following: asyncio.Future[bytes]) -> None:
        self._following = None
        self._end()

    def _finish(self) -> None:
        if self._is_idle():
            return
        if self._following is not None:
            self._following.set_result(b"".join(self._body))
            self._reset()
            return
        assert self._response is not None
        status, headers, body = self._parser.get_status_code(), self._headers, b"".join(self._body)
        self._reset()
        try:
            response = httpx.Response(status, headers=headers, content=body)
        except httpx.DecodingError as error:  # a compressed body is damaged
            self._fail(error)
        else:
            self._response.set_result(response)

    def _fail(self, error: httpx.RequestError) -> None:
        self.is_reusable = False
        if self._is_idle():
            return
        if self._following is not None:
            self._following.set_result(b"")
        elif self._response is not None:
            self._response.set_exception(error)

    def _check_silence(self) -> None:
        """Fail the request if nothing came and nothing was sent in its time."""
        now, unsent = self._loop.time(), self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            self._unsent, self.used = unsent, now
        remaining = self.used + self._seconds - now
        if remaining > 0:
            self._timer = self._loop.call_later(remaining, self._check_silence)
        else:
            self._fail(httpx.WriteTimeout("") if unsent else httpx.ReadTimeout(""))
