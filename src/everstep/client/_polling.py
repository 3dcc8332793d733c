"""Waiting for an operation's result: long polls, through restarts of the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import httpx

from everstep.client._errors import (
    APIConnectionError,
    APIResponseValidationError,
    RequestFailedError,
    status_error,
)
from everstep.client._http import UNPAID, Http, body_of
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.proto import PROTOBUF

T = TypeVar("T")
_POLL_SECONDS = 45.0
_LONGEST_DELAY = 30.0
_BAD_REQUESTS = 3
_PROMPT_POLLS = 8
"""So many 5xx in a row are polled again at once; then the service is given time."""


async def retrieve(
    http: Http,
    request_id: str,
    decode: Callable[[bytes], T] | None,
    read: Callable[[Any], T] | None,
) -> T:
    """Wait for a future's result, however long it takes.

    Args:
        http: the service.
        request_id: the future.
        decode: reads a protobuf result.
        read: reads a JSON result.

    Raises:
        RequestFailedError: the operation failed.
        APIStatusError: the service doesn't know the future (404), or no longer does (410).
        APIResponseValidationError: the result is not what was asked for.
    """
    return await _Poll(http, request_id, decode, read).run()


class _Poll(Generic[T]):
    """The polls for one future, and what went wrong with them so far."""

    def __init__(
        self,
        http: Http,
        request_id: str,
        decode: Callable[[bytes], T] | None,
        read: Callable[[Any], T] | None,
    ) -> None:
        self._http = http
        self._request_id = request_id
        self._decode = decode
        self._read = read
        self._allow_metadata_only = True
        self._unanswered = 0  # in a row: connection errors and 429
        self._broken = 0  # in a row: 5xx
        self._bad = 0  # 400
        self._unpaid: float | None = None

    async def run(self) -> T:
        """Poll until there is a result."""
        iteration = 0
        while True:
            try:
                response = await self._send(iteration)
            except APIConnectionError:
                await self._back_off()
            else:
                if response.status_code == 200:
                    found = self._answer(response)
                    if found is not None:
                        return found[0]
                else:
                    await self._refused(response)
            iteration += 1

    async def _send(self, iteration: int) -> httpx.Response:
        return await self._http.send(
            "POST",
            "/retrieve_future",
            json={
                "request_id": self._request_id,
                "allow_metadata_only": self._allow_metadata_only,
            },
            headers={
                "Accept": PROTOBUF if self._decode is not None else "application/json",
                "X-Tinker-Request-Iteration": str(iteration),
            },
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
            return None
        if answer.get("status") == "complete_metadata":
            if not self._allow_metadata_only:
                raise self._wrong("its size came again instead of itself")
            self._allow_metadata_only = False
            return None
        if "error" in answer:
            raise RequestFailedError(str(answer["error"]), self._request_id, _category(answer))
        if self._read is None:
            raise self._wrong("it is JSON; protobuf was asked for")
        return (self._read(answer),)

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
