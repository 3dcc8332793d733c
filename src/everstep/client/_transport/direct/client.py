"""Which requests go over direct connections, and how they are written."""

from __future__ import annotations

import asyncio
import re
import select
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.request import getproxies

import httpx

from everstep.addresses import is_loopback
from everstep.client._transport.credentials import CREDENTIAL_HEADER, Credential
from everstep.wire.codecs import PROTOBUF
from everstep.wire.codecs.followed import FOLLOWED

if TYPE_CHECKING:
    from everstep.client._transport.direct.pool import ConnectionPool

_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
_FIELDS = re.compile(r"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~]*\r\n)+")
_PORT = 80
_ACCEPTED = f"{FOLLOWED}, {PROTOBUF}, */*"


class DirectClient:
    """Sends the requests that need nothing of httpx's.

    Args:
        client: has the headers of every request, and sends what is not sent here.
        auth: adds the caller's credential to each request.
    """

    def __init__(self, client: httpx.AsyncClient, auth: Credential | None) -> None:
        self._headers = dict(client.headers)  # their names are in lower case
        self._cookies = client.cookies
        self._auth = auth
        self._has_proxy = not {"http", "all"}.isdisjoint(getproxies())
        self._is_open = find_spec("httptools") is not None and hasattr(select, "poll")
        self._pool: ConnectionPool | None = None
        self._pool_key: tuple[asyncio.AbstractEventLoop, str, int] | None = None

    async def send(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        content: bytes | None,
        seconds: float,
        *,
        follow: bool = False,
    ) -> httpx.Response | None:
        """Send a request and return the response whatever its status.

        Args:
            method: of the request.
            url: of the request.
            headers: of the request.
            content: the body.
            seconds: bound on each wait.
            follow: accept that the operation's result follows, see `Connection.exchange`.

        Returns:
            The response, or None: the request was not sent, and is one for httpx.

        Raises:
            httpx.RequestError: there was no response.
        """
        if method not in _METHODS or not self._reaches(url):
            return None
        if follow:
            headers = {**headers, "Accept": _ACCEPTED}
        credential = None if self._auth is None else await self._auth.credential_for(url.path)
        response = await self._send(method, url, headers, credential, content, seconds)
        if response is None or self._auth is None:
            return response
        if self._auth.drop_rejected(credential, response):
            credential = await self._auth.token()
            return await self._send(method, url, headers, credential, content, seconds)
        return response

    def close(self) -> None:
        """Close the connections, and leave all further requests to httpx."""
        self._is_open = False
        if self._pool is not None:
            self._pool.close()

    async def _send(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        credential: str | None,
        content: bytes | None,
        seconds: float,
    ) -> httpx.Response | None:
        head = self._head(method, url, headers, credential, content)
        if head is None:
            return None
        response = await self._connections(url).send(head, content or b"", seconds)
        if "set-cookie" in response.headers:  # by a balancer, which it names the server to
            response.request = httpx.Request(method, url)
            self._cookies.extract_cookies(response)
            self.close()
        return response

    def _reaches(self, url: httpx.URL) -> bool:
        """Return whether a service can be reached without TLS, proxy and the URL's password."""
        if not self._is_open or url.scheme != "http" or url.userinfo:
            return False
        return not self._has_proxy or is_loopback(url.host)

    def _head(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        credential: str | None,
        content: bytes | None,
    ) -> bytes | None:
        """Return a request's first line and header fields, or None if one is malformed."""
        fields = {"host": url.netloc.decode("ascii"), **self._headers}
        for name, value in headers.items():
            fields[name.lower()] = value
        if credential is not None:
            fields[CREDENTIAL_HEADER.lower()] = credential
        if content is not None or method in ("PATCH", "POST", "PUT"):
            fields["content-length"] = str(len(content or b""))
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        if not _FIELDS.fullmatch(lines) or lines.count("\r\n") != len(fields):
            return None
        return b"%s %s HTTP/1.1\r\n%s\r\n" % (method.encode(), url.raw_path, lines.encode())

    def _connections(self, url: httpx.URL) -> ConnectionPool:
        """Return the connections to a URL's host. A forked process leaves its parent's alone."""
        loop = asyncio.get_running_loop()
        key = (loop, url.host, url.port or _PORT)
        if self._pool is None or key != self._pool_key:
            from everstep.client._transport.direct.pool import ConnectionPool

            if self._pool is not None and self._pool_key is not None and self._pool_key[0] is loop:
                self._pool.close()
            self._pool, self._pool_key = ConnectionPool(url.host, url.port or _PORT), key
        return self._pool
