"""Waiting for an operation's result: long polls, through restarts of the service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from everstep.client._errors import APIConnectionError, RequestFailedError, status_error
from everstep.client._http import Http, body_of
from everstep.wire.errors import ErrorCategory
from everstep.wire.proto import PROTOBUF

T = TypeVar("T")
_POLL_SECONDS = 45.0
_LONGEST_DELAY = 30.0
_BAD_REQUESTS = 3


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
        APIStatusError: the service doesn't know the future.
    """
    headers = {"Accept": PROTOBUF if decode is not None else "application/json"}
    allow_metadata_only = True
    failures, bad = 0, 0
    iteration = 0
    while True:
        body = {"request_id": request_id, "allow_metadata_only": allow_metadata_only}
        headers["X-Tinker-Request-Iteration"] = str(iteration)
        iteration += 1
        try:
            response = await http.send(
                "POST", "/retrieve_future", json=body, headers=headers, timeout=_POLL_SECONDS
            )
        except APIConnectionError:
            failures += 1
            await asyncio.sleep(min(2.0 ** (failures - 1), _LONGEST_DELAY))
            continue
        status = response.status_code
        if status == 200:
            answer: Any = _answer(response, request_id, decode)
            if not isinstance(answer, dict):
                result: T = answer
                return result
            if answer.get("status") == "complete_metadata":
                allow_metadata_only = False
                continue
            if answer.get("type") == "try_again":
                continue
            if read is None:
                raise TypeError(f"future {request_id} has a JSON result; protobuf was expected")
            return read(answer)
        if status == 408:
            failures = 0
        elif status in (429, 503) or status >= 500:
            failures += 1
            await asyncio.sleep(min(0.25 * 2.0**failures, _LONGEST_DELAY))
        elif status == 400 and bad < _BAD_REQUESTS:
            bad += 1
        else:
            raise status_error(status, body_of(response))


def _answer(response: httpx.Response, request_id: str, decode: Callable[[bytes], T] | None) -> Any:
    """A protobuf result decoded, or the JSON of anything else; raises for a failure."""
    if decode is not None and response.headers.get("content-type", "").startswith(PROTOBUF):
        return decode(response.content)
    answer = response.json()
    if isinstance(answer, dict) and "error" in answer:
        try:
            category = ErrorCategory(str(answer.get("category")))
        except ValueError:
            category = ErrorCategory.UNKNOWN
        raise RequestFailedError(str(answer["error"]), request_id, category)
    return answer
