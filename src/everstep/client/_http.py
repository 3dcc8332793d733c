"""HTTP: retries, idempotency keys, errors by status."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any, TypeVar

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse
from pydantic import BaseModel, ValidationError

from everstep.client import _hooks, _tracing
from everstep.client._errors import (
    APIConnectionError,
    APIResponseValidationError,
    APITimeoutError,
    TinkerError,
    status_error,
)
from everstep.client._outage import Outage
from everstep.client._version import VERSION

_log = logging.getLogger("everstep.client")
Timeout = httpx.Timeout
RequestOptions = Mapping[str, Any]
"""Headers, parameters and a time-out of one request, as the official SDK takes them."""
Answer = TypeVar("Answer", bound=BaseModel)
RETRIED = frozenset({408, 409, 429})
UNPAID = 402
_RETRY_SECONDS = 300.0
_FIRST_DELAY = 0.5
_LONGEST_DELAY = 10.0
_LONGEST_ASKED = 60.0
_UNPAID_SECONDS = 3600.0
_UNPAID_DELAY = 5.0
_POLLS = 4096


class Http:
    """Requests to one service.

    Args:
        base_url: of the service; a path prefix is kept.
        auth: puts the caller's credential on each request.
        headers: sent with every request.
        lost: says why the service will not come back, if that is known.
    """

    def __init__(
        self,
        base_url: str,
        auth: httpx.Auth | None,
        headers: Mapping[str, str] | None = None,
        lost: Callable[[], TinkerError | None] = lambda: None,
    ) -> None:
        own = {
            "User-Agent": f"everstep/{VERSION}",
            "X-Stainless-Package-Version": VERSION,
            **(headers or {}),
        }
        self.base_url = base_url.rstrip("/")
        self._lost = lost
        self._outage = Outage(self.base_url)
        self._client = httpx.AsyncClient(
            headers=own,
            auth=auth,
            timeout=httpx.Timeout(60.0, connect=10.0),
            limits=httpx.Limits(max_connections=_POLLS, max_keepalive_connections=64),
            follow_redirects=True,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def wait(self, seconds: float) -> None:
        """Wait between two attempts."""
        await asyncio.sleep(seconds)

    def now(self) -> float:
        """Seconds on the clock that `wait` moves on."""
        return monotonic()

    async def wait_unpaid(self, since: float | None) -> float | None:
        """Wait for a bill to be paid (402), for up to an hour.

        Args:
            since: when the first refusal of that kind came; None: this is the first.

        Returns:
            When the first came; None: there was time enough, give up.
        """
        if since is None:
            _log.warning("the service asks for payment (402); waiting for up to an hour")
            since = monotonic()
        elif monotonic() - since > _UNPAID_SECONDS:
            return None
        await self.wait(_UNPAID_DELAY)
        return since

    async def check(self) -> None:
        """Ask for the service's models, once.

        Raises:
            APIError: that is refused, or there is no answer.
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
    ) -> httpx.Response:
        """Send one request, once; whatever the answer's status.

        Raises:
            APIConnectionError: there was no answer.
            LocalServiceError: nor will there be one.
        """
        with self._reached(method, path, timeout):
            return await self._client.request(
                method,
                f"{self.base_url}/api/v1{path}",
                json=json,
                content=content,
                headers=_tracing.headers(headers),
                params=params,
                timeout=timeout,
                follow_redirects=follow_redirects,
            )

    @asynccontextmanager
    async def events(
        self, path: str, params: Mapping[str, Any], silence: float
    ) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
        """Read server-sent events; raises as `send` does, as long as they are read.

        Args:
            path: of the request, a GET.
            params: of the request.
            silence: seconds without a sign of life after which the service counts as lost.

        Raises:
            APIStatusError: it was refused.
        """
        with self._reached("GET", path, silence):
            async with aconnect_sse(
                self._client,
                "GET",
                f"{self.base_url}/api/v1{path}",
                headers=dict(_tracing.headers({}) or {}),
                params=params,
                timeout=silence,
            ) as source:
                if source.response.status_code >= 400:
                    await source.response.aread()
                    raise status_error(source.response.status_code, body_of(source.response))
                yield source.aiter_sse()

    @contextmanager
    def _reached(self, method: str, path: str, seconds: float) -> Iterator[None]:
        """Raise what tells that a service was not reached, or went away."""
        try:
            yield
        except httpx.TimeoutException as error:
            self._outage.goes_on(monotonic(), error, silent_for=seconds)
            raise APITimeoutError(f"{method} {path}: no answer in {seconds:g} s") from error
        except httpx.RequestError as error:  # also of a body that is cut, or can't be decoded
            if (lost := self._lost()) is not None:
                raise type(lost)(*lost.args) from error
            self._outage.goes_on(monotonic(), error)
            raise APIConnectionError(
                f"{method} {path}: {self.base_url} can't be reached: {error!r}"
            ) from error
        self._outage.ends(monotonic())

    async def request(
        self, method: str, path: str, *, hand_back: Container[int] = (), **arguments: Any
    ) -> httpx.Response:
        """Send a request, again and again for up to five minutes where that may help.

        Args:
            method: of the request.
            path: of the request.
            hand_back: statuses that the caller deals with: raised at once.
            arguments: see `send`.

        Raises:
            APIStatusError: it was refused.
            APIConnectionError: there was no answer in all that time.
        """
        headers = dict(arguments.pop("headers", None) or {})
        if method != "GET":
            headers.setdefault("X-Idempotency-Key", f"everstep-{uuid.uuid4()}")
        begin = monotonic()
        unpaid: float | None = None
        attempt = 0
        while True:
            headers["x-stainless-retry-count"] = str(attempt)
            doubled = _FIRST_DELAY * 2.0 ** min(attempt, 10)
            delay = min(doubled, _LONGEST_DELAY) * random.uniform(0.75, 1.0)
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
                delay = _asked_delay(response) or delay
            attempt += 1
            _hooks.current().retries += 1
            await self.wait(delay)

    async def call(self, method: str, path: str, answer: type[Answer], **arguments: Any) -> Answer:
        """Send a request and read its answer.

        Raises:
            APIResponseValidationError: the answer is not of that type.
        """
        return read(answer, body_of(await self.request(method, path, **arguments)))


def read(answer: type[Answer], body: Any) -> Answer:
    """Read an answer's JSON as a type; raises `APIResponseValidationError`."""
    try:
        return answer.model_validate(body)
    except ValidationError as error:
        raise APIResponseValidationError(
            f"The service's answer is not a {answer.__name__}: {error}"
        ) from error


def body_of(response: httpx.Response) -> Any:
    """An answer's JSON, or its text."""
    try:
        return response.json()
    except ValueError:
        return response.text


def _may_retry(response: httpx.Response) -> bool:
    said = response.headers.get("x-should-retry")
    if said in ("true", "false"):
        return bool(said == "true")
    status = response.status_code
    if status == 400 and not response.content:  # no service says so little: a proxy's noise
        return True
    return status in RETRIED or status >= 500


def _asked_delay(response: httpx.Response) -> float | None:
    """Seconds that the service asks to wait for, if it asks sensibly."""
    for header, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers[header]) * unit
        except (KeyError, ValueError):
            continue
        if 0 < seconds <= _LONGEST_ASKED:
            return seconds
    return None
