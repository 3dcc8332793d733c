"""Connections to one host: opened as they are needed, and kept for the next request."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from everstep.client._transport.direct import FOLLOWING
from everstep.client._transport.direct.connection import Connection

_MAX_CONNECTIONS = 4096
_MAX_KEPT = 64
_KEPT_SECONDS = 5.0
"""Time after which an idle connection is closed: servers and networks drop them without a word."""
_HAPPY_EYEBALLS_SECONDS = 0.25


class ConnectionPool:
    """Connections to one host, on one event loop.

    Args:
        host: a name or an IP address, without brackets.
        port: of the service.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[Connection] = []
        self._is_closed = False
        self._free = asyncio.Semaphore(_MAX_CONNECTIONS)

    async def send(self, head: bytes, body: bytes, seconds: float) -> httpx.Response:
        """Send a request and return its response. See `Connection.exchange`.

        Args:
            head: the request's first line and header fields.
            body: as long as the head says.
            seconds: bound on each wait: for a free connection, for a new one, for data.
        """
        await self._reserve(seconds)
        following = None
        try:
            connection = self._kept() or await self._connect(seconds)
            response = await connection.exchange(head, body, seconds)
            following = response.extensions.get(FOLLOWING)
        finally:
            if following is None:
                self._free.release()
        if following is None:
            self._keep(connection)
        else:
            following.add_done_callback(lambda _: self._end_following(connection))
        return response

    def _end_following(self, connection: Connection) -> None:
        self._free.release()
        self._keep(connection)

    def close(self) -> None:
        """Close the connections that no request uses now, and the others when theirs ends."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()

    async def _reserve(self, seconds: float) -> None:
        if not self._free.locked():
            await self._free.acquire()
            return
        try:
            async with asyncio.timeout(seconds):
                await self._free.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("") from None

    def _kept(self) -> Connection | None:
        """Return the connection that was used last, and close those that are too old to trust."""
        oldest = asyncio.get_running_loop().time() - _KEPT_SECONDS
        while self._idle and self._idle[0].used < oldest:
            self._idle.pop(0).close()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open():
                return connection
            connection.close()
        return None

    def _keep(self, connection: Connection) -> None:
        if connection.is_reusable and not self._is_closed and len(self._idle) < _MAX_KEPT:
            self._idle.append(connection)
        else:
            connection.close()

    async def _connect(self, seconds: float) -> Connection:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        if isinstance(loop, asyncio.BaseEventLoop):  # uvloop tries one address after the other
            options["happy_eyeballs_delay"] = _HAPPY_EYEBALLS_SECONDS
        try:
            async with asyncio.timeout(seconds):
                _, connection = await loop.create_connection(
                    lambda: Connection(loop), self._host, self._port, **options
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        return connection
