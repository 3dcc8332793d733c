"""Waiting for an operation's result: long polls, through restarts of the service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, TypeVar

import httpx

from everstep.client._errors import (
    APIConnectionError,
    APIResponseValidationError,
    RequestFailedError,
    status_error,
)
from everstep.client._hooks import current
from everstep.client._http import UNPAID, body_of
from everstep.client._queue import QueueObserver, QueueState, tell_queue
from everstep.client._session import Connection
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.proto import PROTOBUF

T = TypeVar("T")
_POLL_SECONDS = 45.0
_LONGEST_DELAY = 30.0
_BAD_REQUESTS = 3
_PROMPT_POLLS = 8
"""So many 5xx in a row are polled again at once; then the service is given time."""


@dataclass(frozen=True)
class Asked:
    """An operation as it was asked for.

    Attributes:
        request_type: ``ForwardBackward``, ``OptimStep``, ``Sample``, ….
        since: when, on `monotonic`'s clock.
        observer: is told when the service lets it wait.
    """

    request_type: str
    since: float
    observer: QueueObserver | None = None


async def retrieve(
    connection: Connection,
    request_id: str,
    asked: Asked,
    decode: Callable[[bytes], T] | None,
    read: Callable[[Any], T] | None,
) -> T:
    """Wait for a future's result, however long it takes; called when it was accepted.

    Args:
        connection: to the service.
        request_id: the future.
        asked: what it is of.
        decode: reads a protobuf result.
        read: reads a JSON result.

    Raises:
        RequestFailedError: the operation failed.
        APIStatusError: the service doesn't know the future (404), or no longer does (410).
        APIResponseValidationError: the result is not what was asked for.
    """
    return await _Poll(connection, request_id, asked, decode, read).run()


class _Poll(Generic[T]):
    """The polls for one future, and what went wrong with them so far."""

    def __init__(
        self,
        connection: Connection,
        request_id: str,
        asked: Asked,
        decode: Callable[[bytes], T] | None,
        read: Callable[[Any], T] | None,
    ) -> None:
        self._http = connection.http
        self._budget = connection.budgets.responses
        self._request_id = request_id
        self._asked = asked
        self._roundtrip = monotonic() - asked.since
        self._decode = decode
        self._read = read
        self._iteration = 0
        self._size: int | None = None  # of a large result, once it is known
        self._unanswered = 0  # in a row: connection errors and 429
        self._broken = 0  # in a row: 5xx
        self._bad = 0  # 400
        self._unpaid: float | None = None

    async def run(self) -> T:
        """Poll until there is a result; a large one is fetched when there is room for it."""
        found = await self._poll()
        while found is None:
            if self._size is None:
                found = await self._poll()
            else:
                async with self._budget.reserve(self._size):
                    while found is None:
                        found = await self._poll()
        tell_queue(self._asked.observer, {"queue_state": QueueState.ACTIVE})
        return found[0]

    async def _poll(self) -> tuple[T] | None:
        """Ask once; None: it may help to ask again."""
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
        await self._refused(response)
        return None

    async def _send(self) -> httpx.Response:
        headers = {
            "Accept": PROTOBUF if self._decode is not None else "application/json",
            "X-Tinker-Request-Iteration": str(self._iteration),
            "X-Tinker-Request-Type": self._asked.request_type,
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
        await self._http.wait(min(2.0 ** min(self._unanswered, 10), _LONGEST_DELAY))
        self._unanswered += 1

    async def _refused(self, response: httpx.Response) -> None:
        """Return when it may help to poll again; raise otherwise."""
        status = response.status_code
        if status == 429:
            await self._back_off()
            return
        self._unanswered = 0
        if status == 408:  # not finished yet
            self._broken = self._bad = 0
            self._tell_queue(body_of(response))
        elif status >= 500:
            self._broken += 1
            if self._broken > _PROMPT_POLLS:
                beyond = min(self._broken - _PROMPT_POLLS - 1, 10)
                await self._http.wait(min(0.25 * 2.0**beyond, _LONGEST_DELAY))
        elif status == UNPAID:
            self._unpaid = await self._http.wait_unpaid(self._unpaid)
            if self._unpaid is None:
                raise status_error(status, body_of(response))
        elif status == 400 and self._bad < _BAD_REQUESTS:  # may be a proxy's noise
            self._bad += 1
        else:
            raise status_error(status, body_of(response))

    def _answer(self, response: httpx.Response) -> tuple[T] | None:
        """The result; None: it isn't there yet."""
        self._unanswered = self._broken = 0
        if PROTOBUF in response.headers.get("content-type", ""):
            return (self._decoded(response.content),)
        try:
            answer = response.json()
        except ValueError as error:
            raise self._wrong("it is not JSON") from error
        if not isinstance(answer, dict):
            raise self._wrong("it is not a JSON object")
        if answer.get("type") == "try_again":
            self._tell_queue(answer)
            return None
        if answer.get("status") == "complete_metadata":
            if self._size is not None:
                raise self._wrong("its size came again instead of itself")
            size = answer.get("response_payload_size")
            self._size = size if isinstance(size, int) else 0
            return None
        if "error" in answer:
            tell_queue(self._asked.observer, {"queue_state": QueueState.ACTIVE})
            raise RequestFailedError(str(answer["error"]), self._request_id, _category(answer))
        if self._read is None:
            raise self._wrong("it is JSON; protobuf was asked for")
        return (self._read(answer),)

    def _tell_queue(self, answer: Any) -> None:
        if isinstance(answer, dict):
            tell_queue(self._asked.observer, answer)

    def _decoded(self, content: bytes) -> T:
        if self._decode is None:
            raise self._wrong("it is protobuf; JSON was asked for")
        try:
            return self._decode(content)
        except WireError as error:
            raise self._wrong(str(error)) from error

    def _wrong(self, why: str) -> APIResponseValidationError:
        return APIResponseValidationError(
            f"The result of request {self._request_id} can't be read: {why}"
        )


def _category(answer: dict[str, Any]) -> ErrorCategory:
    try:
        return ErrorCategory(str(answer.get("category")))
    except ValueError:
        return ErrorCategory.UNKNOWN
