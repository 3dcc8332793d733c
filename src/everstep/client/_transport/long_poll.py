"""Long polls: wait for an operation's result, through restarts of the service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, TypeVar

import httpx

from everstep.backoff import Backoff
from everstep.client._transport.errors import (
    APIConnectionError,
    APIResponseValidationError,
    RequestFailedError,
    status_error,
)
from everstep.client._transport.http import UNPAID, body_of
from everstep.client._transport.queue_state import QueueObserver, QueueState, notify_queue_state
from everstep.client._transport.request_events import current
from everstep.client._transport.session import Connection
from everstep.wire.codecs import PROTOBUF
from everstep.wire.codecs.followed import split_result
from everstep.wire.errors import ErrorCategory, WireError

T = TypeVar("T")
_POLL_SECONDS = 45.0
_BACKOFF = Backoff(initial=1.0, max=30.0)
_SERVER_ERROR_BACKOFF = Backoff(initial=0.25, max=30.0)
_MAX_BAD_REQUESTS = 3
_IMMEDIATE_POLLS = 8
"""Consecutive 5xx responses after which polls back off."""


@dataclass(frozen=True)
class RequestInfo:
    """Description of a submitted operation.

    Attributes:
        request_type: ``ForwardBackward``, ``OptimStep``, ``Sample``, ….
        since: time of the call, on `monotonic`'s clock.
        observer: called when the service pauses the operation.
    """

    request_type: str
    since: float
    observer: QueueObserver | None = None


async def retrieve(
    connection: Connection,
    request_id: str,
    request_info: RequestInfo,
    decode: Callable[[bytes], T] | None,
    read: Callable[[Any], T] | None,
    following: asyncio.Future[bytes] | None = None,
) -> T:
    """Wait for a future's result, however long it takes. Call it when the operation was accepted.

    Args:
        connection: to the service.
        request_id: the future.
        request_info: the operation.
        decode: decodes a protobuf result.
        read: parses a JSON result.
        following: the result, if the service sends it after the acceptance.

    Raises:
        RequestFailedError: the operation failed.
        APIStatusError: the service doesn't know the future (404), or no longer has it (410).
        APIResponseValidationError: the result has another type.
    """
    polls = _LongPoll(connection, request_id, request_info, decode, read)
    return await polls.run(following)


class _LongPoll(Generic[T]):
    """The polls for one future, and the failures among them."""

    def __init__(
        self,
        connection: Connection,
        request_id: str,
        request_info: RequestInfo,
        decode: Callable[[bytes], T] | None,
        read: Callable[[Any], T] | None,
    ) -> None:
        self._http = connection.http
        self._budget = connection.budgets.responses
        self._request_id = request_id
        self._request_info = request_info
        self._roundtrip = monotonic() - request_info.since
        self._decode = decode
        self._read = read
        self._iteration = 0
        self._size: int | None = None  # of a large result, once known
        self._unanswered = 0  # consecutive connection errors and 429
        self._server_errors = 0  # consecutive 5xx
        self._bad_requests = 0  # 400
        self._unpaid: float | None = None

    async def run(self, following: asyncio.Future[bytes] | None) -> T:
        """Poll until there is a result. A large one is only fetched within the byte budget."""
        found = None if following is None else self._followed(await following)
        if found is None and self._size is None:
            found = await self._poll()
        while found is None:
            if self._size is None:
                found = await self._poll()
            else:
                async with self._budget.reserve(self._size):
                    while found is None:
                        found = await self._poll()
        notify_queue_state(self._request_info.observer, {"queue_state": QueueState.ACTIVE})
        return found[0]

    def _followed(self, content: bytes) -> tuple[T] | None:
        """Return the result that followed the acceptance. None: poll."""
        parts = split_result(content)
        if parts is None:
            return None
        media_type, body = parts
        return self._answer(httpx.Response(200, headers={"content-type": media_type}, content=body))

    async def _poll(self) -> tuple[T] | None:
        """Poll once. None means: poll again."""
        try:
            response = await self._send()
        except APIConnectionError:
            await self._back_off()
            return None
        finally:
            self._iteration += 1
            current().polls += 1
        if response.status_code == 200:
            return self._answer(response)
        await self._handle_error(response)
        return None

    async def _send(self) -> httpx.Response:
        headers = {
            "Accept": PROTOBUF if self._decode is not None else "application/json",
            "X-Tinker-Request-Iteration": str(self._iteration),
            "X-Tinker-Request-Type": self._request_info.request_type,
        }
        if self._iteration == 0:
            headers["X-Tinker-Create-Promise-Roundtrip-Time"] = str(self._roundtrip)
        return await self._http.send(
            "POST",
            "/retrieve_future",
            json={"request_id": self._request_id, "allow_metadata_only": self._size is None},
            headers=headers,
            timeout=_POLL_SECONDS,
        )

    async def _back_off(self) -> None:
        await self._http.wait(_BACKOFF.delay(self._unanswered))
        self._unanswered += 1

    async def _handle_error(self, response: httpx.Response) -> None:
        """Return if another poll may help, raise otherwise."""
        status = response.status_code
        if status == 429:
            await self._back_off()
            return
        self._unanswered = 0
        if status == 408:  # not finished yet
            self._server_errors = self._bad_requests = 0
            self._notify_queue(body_of(response))
        elif status >= 500:
            self._server_errors += 1
            if self._server_errors > _IMMEDIATE_POLLS:
                attempt = self._server_errors - _IMMEDIATE_POLLS - 1
                await self._http.wait(_SERVER_ERROR_BACKOFF.delay(attempt))
        elif status == UNPAID:
            self._unpaid = await self._http.wait_unpaid(self._unpaid)
            if self._unpaid is None:
                raise status_error(status, body_of(response))
        elif status == 400 and self._bad_requests < _MAX_BAD_REQUESTS:  # may be a proxy's
            self._bad_requests += 1
        else:
            raise status_error(status, body_of(response))

    def _answer(self, response: httpx.Response) -> tuple[T] | None:
        """Return the result, or None if it is not available yet."""
        self._unanswered = self._server_errors = 0
        if PROTOBUF in response.headers.get("content-type", ""):
            return (self._decoded(response.content),)
        try:
            answer = response.json()
        except ValueError as error:
            raise self._invalid("it is not JSON") from error
        if not isinstance(answer, dict):
            raise self._invalid("it is not a JSON object")
        if answer.get("type") == "try_again":
            self._notify_queue(answer)
            return None
        if answer.get("status") == "complete_metadata":
            if self._size is not None:
                raise self._invalid("the service sent its size a second time instead of the result")
            size = answer.get("response_payload_size")
            self._size = size if isinstance(size, int) else 0
            return None
        if "error" in answer:
            notify_queue_state(self._request_info.observer, {"queue_state": QueueState.ACTIVE})
            raise RequestFailedError(str(answer["error"]), self._request_id, _category(answer))
        if self._read is None:
            raise self._invalid("it is JSON, but protobuf was requested")
        return (self._read(answer),)

    def _notify_queue(self, answer: Any) -> None:
        if isinstance(answer, dict):
            notify_queue_state(self._request_info.observer, answer)

    def _decoded(self, content: bytes) -> T:
        if self._decode is None:
            raise self._invalid("it is protobuf, but JSON was requested")
        try:
            return self._decode(content)
        except WireError as error:
            raise self._invalid(str(error)) from error

    def _invalid(self, why: str) -> APIResponseValidationError:
        return APIResponseValidationError(
            f"The result of request {self._request_id} can't be read: {why}"
        )


def _category(answer: dict[str, Any]) -> ErrorCategory:
    try:
        return ErrorCategory(str(answer.get("category")))
    except ValueError:
        return ErrorCategory.UNKNOWN
