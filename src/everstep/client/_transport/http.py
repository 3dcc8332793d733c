"""HTTP requests: retries, idempotency keys, errors by status."""

from __future__ import annotations

import asyncio
import functools
import json as jsonlib
import logging
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any, TypeVar

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse
from pydantic import BaseModel, ValidationError

from everstep._version import __version__
from everstep.addresses import without_proxies
from everstep.backoff import Backoff
from everstep.client._transport import otel, request_events
from everstep.client._transport.credentials import Credential
from everstep.client._transport.direct.client import DirectClient
from everstep.client._transport.errors import (
    APIConnectionError,
    APIResponseValidationError,
    APITimeoutError,
    TinkerError,
    status_error,
)
from everstep.client._transport.futures import submit_from_finalizer
from everstep.client._transport.outage_log import OutageLog

_log = logging.getLogger("everstep.client")
Timeout = httpx.Timeout
RequestOptions = Mapping[str, Any]
"""Headers, parameters and the timeout of one request, as the official SDK takes them."""
Answer = TypeVar("Answer", bound=BaseModel)
RETRIED = frozenset({408, 409, 429})
UNPAID = 402
_RETRY_SECONDS = 300.0
_BACKOFF = Backoff(initial=0.5, max=10.0, jitter=0.25)
_MAX_RETRY_AFTER = 60.0
_UNPAID_SECONDS = 3600.0
_UNPAID_DELAY = 5.0
_MAX_CONNECTIONS = 4096


class Http:
    """Sends requests to one service.

    Args:
        base_url: of the service. A path prefix is kept.
        auth: adds the caller's credential to each request.
        headers: sent with every request.
        lost: returns the reason why the service will not come back, if it is known.
        current: returns the present address of a service by an earlier one.
        transport: answers the requests instead of the network.
    """

    def __init__(
        self,
        base_url: str,
        auth: Credential | None,
        headers: Mapping[str, str] | None = None,
        lost: Callable[[], TinkerError | None] = lambda: None,
        current: Callable[[str], str] = str,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        own = {
            "User-Agent": f"everstep/{__version__}",
            "X-Stainless-Package-Version": __version__,
            **(headers or {}),
        }
        self._base_url = _checked(base_url).rstrip("/")
        self._current = current
        self._lost = lost
        self._outage = OutageLog(self.base_url)
        self._client = httpx.AsyncClient(
            headers=own,
            auth=auth,
            timeout=httpx.Timeout(60.0, connect=10.0),
            limits=httpx.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=64),
            follow_redirects=True,
            transport=transport,
            mounts=without_proxies(base_url),
        )
        self._direct = None if transport else DirectClient(self._client, auth)
        dropped = weakref.finalize(
            self, submit_from_finalizer, functools.partial(_close, self._client, self._direct)
        )
        dropped.atexit = False  # the process's end closes them

    @property
    def base_url(self) -> str:
        """The service's address."""
        return self._current(self._base_url)

    @base_url.setter
    def base_url(self, url: str) -> None:
        self._base_url = url

    async def close(self) -> None:
        """Close the connections."""
        await _close(self._client, self._direct)

    async def wait(self, seconds: float) -> None:
        """Wait between two attempts."""
        await asyncio.sleep(seconds)

    def now(self) -> float:
        """Return the seconds of the clock that `wait` advances."""
        return monotonic()

    async def wait_unpaid(self, since: float | None) -> float | None:
        """Wait before another attempt while a bill is unpaid (402), for up to an hour in all.

        Args:
            since: time of the first such response. None: this is the first.

        Returns:
            The time of the first such response. None once the hour is over.
        """
        if since is None:
            _log.warning("the service requires payment (402); retrying for up to an hour")
            since = monotonic()
        elif monotonic() - since > _UNPAID_SECONDS:
            return None
        await self.wait(_UNPAID_DELAY)
        return since

    async def check(self) -> None:
        """Request the service's models, once.

        Raises:
            APIError: the request was refused, or there was no response.
        """
        response = await self.send("GET", "/get_server_capabilities")
        if response.status_code >= 400:
            raise status_error(response.status_code, body_of(response))

    async def send(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        timeout: float = 60.0,  # noqa: ASYNC109  httpx enforces it
        follow_redirects: bool = True,
        follow: bool = False,
    ) -> httpx.Response:
        """Send one request, once, and return the response whatever its status.

        With ``follow`` it may come with a future of the operation's result: see `following`.

        Raises:
            APIConnectionError: there was no response.
            LocalServiceError: the embedded service has failed for good.
        """
        headers = dict(otel.headers(headers) or {})
        if json is not None:
            content = jsonlib.dumps(json, separators=(",", ":"), allow_nan=False).encode()
            headers.setdefault("Content-Type", "application/json")
        with self._connection_errors(method, path, timeout):
            url = _parsed(f"{self.base_url}/api/v1{path}")
            if self._direct is not None and params is None:
                response = await self._direct.send(
                    method, url, headers, content, timeout, follow=follow
                )
                if response is not None and not (
                    follow_redirects and response.has_redirect_location
                ):
                    return response
            return await self._client.request(
                method,
                url,
                content=content,
                headers=headers,
                params=params,
                timeout=timeout,
                follow_redirects=follow_redirects,
            )

    @asynccontextmanager
    async def events(
        self, path: str, params: Mapping[str, Any], silence: float
    ) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
        """Read server-sent events. While they are read, errors are raised as by `send`.

        Args:
            path: of the request, a GET.
            params: of the request.
            silence: seconds without data after which the connection counts as lost.

        Raises:
            APIStatusError: the request was refused.
        """
        with self._connection_errors("GET", path, silence):
            async with aconnect_sse(
                self._client,
                "GET",
                f"{self.base_url}/api/v1{path}",
                headers=dict(otel.headers({}) or {}),
                params=params,
                timeout=silence,
            ) as source:
                if source.response.status_code >= 400:
                    await source.response.aread()
                    raise status_error(source.response.status_code, body_of(source.response))
                yield source.aiter_sse()

    @contextmanager
    def _connection_errors(self, method: str, path: str, seconds: float) -> Iterator[None]:
        """Translate httpx's connection errors into the client's, and record them as outages."""
        try:
            yield
        except httpx.TimeoutException as error:
            self._outage.record_failure(monotonic(), error, silent_for=seconds)
            raise APITimeoutError(f"{method} {path}: no answer in {seconds:g} s") from error
        except httpx.RequestError as error:  # or the body is cut off, or can't be decoded
            if (lost := self._lost()) is not None:
                raise type(lost)(*lost.args) from error
            self._outage.record_failure(monotonic(), error)
            raise APIConnectionError(
                f"{method} {path}: can't reach {self.base_url}: {error!r}"
            ) from error
        self._outage.record_response(monotonic())

    async def request(
        self, method: str, path: str, *, hand_back: Container[int] = (), **arguments: Any
    ) -> httpx.Response:
        """Send a request, retrying for up to five minutes where that may help.

        Args:
            method: of the request.
            path: of the request.
            hand_back: statuses that are raised at once, for the caller to handle.
            arguments: see `send`.

        Raises:
            APIStatusError: the request was refused.
            APIConnectionError: there was no response in that time.
        """
        headers = dict(arguments.pop("headers", None) or {})
        if method != "GET":
            headers.setdefault("X-Idempotency-Key", f"everstep-{uuid.uuid4()}")
        begin = monotonic()
        unpaid: float | None = None
        attempt = 0
        while True:
            headers["x-stainless-retry-count"] = str(attempt)
            delay = _BACKOFF.delay(attempt)
            late = monotonic() - begin > _RETRY_SECONDS
            try:
                response = await self.send(method, path, headers=headers, **arguments)
            except APIConnectionError:
                if late:
                    raise
            else:
                status = response.status_code
                if status < 400:
                    return response
                if status == UNPAID and (unpaid := await self.wait_unpaid(unpaid)) is not None:
                    begin = monotonic()
                    continue
                if late or status in hand_back or not _may_retry(response):
                    raise status_error(status, body_of(response))
                delay = _retry_after(response) or delay
            attempt += 1
            request_events.current().retries += 1
            await self.wait(delay)

    async def call(self, method: str, path: str, answer: type[Answer], **arguments: Any) -> Answer:
        """Send a request and parse its response.

        Raises:
            APIResponseValidationError: the response has another type.
        """
        return read(answer, body_of(await self.request(method, path, **arguments)))


async def _close(client: httpx.AsyncClient, direct: DirectClient | None) -> None:
    if direct is not None:
        direct.close()
    await client.aclose()


@functools.lru_cache(maxsize=256)
def _parsed(url: str) -> httpx.URL:
    """Parse a URL once: training sends the same few, and httpx would parse each of them twice."""
    return httpx.URL(url)


def _checked(base_url: str) -> str:
    """Return a service's address unchanged, or raise `TinkerError` if requests can't go there."""
    try:
        url = httpx.URL(base_url)
        complete = url.scheme in ("http", "https") and url.host and not (url.query or url.fragment)
    except httpx.InvalidURL:
        complete = False
    if not complete:
        raise TinkerError(
            f"base_url (TINKER_BASE_URL): {base_url!r} is not the address of a service; give "
            "http://HOST:PORT or https://HOST, an IPv6 address in brackets, and no query."
        )
    return base_url


def read(answer: type[Answer], body: Any) -> Answer:
    """Parse a response's JSON as a type. Raises `APIResponseValidationError`."""
    try:
        return answer.model_validate(body)
    except ValidationError as error:
        raise APIResponseValidationError(
            f"The service's response is not a valid {answer.__name__}: {error}"
        ) from error


def body_of(response: httpx.Response) -> Any:
    """Return a response's JSON, or its text."""
    try:
        return response.json()
    except ValueError:
        return response.text


def _may_retry(response: httpx.Response) -> bool:
    hint = response.headers.get("x-should-retry")
    if hint in ("true", "false"):
        return bool(hint == "true")
    status = response.status_code
    if status == 400 and not response.content:  # services send a message: this is a proxy's
        return True
    return status in RETRIED or status >= 500


def _retry_after(response: httpx.Response) -> float | None:
    """Return the delay in seconds that the service asks for, if it is between 0 and a minute."""
    for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers[header]) * unit
        except (KeyError, ValueError):
            continue
        if 0 < seconds <= _MAX_RETRY_AFTER:
            return seconds
    return None
