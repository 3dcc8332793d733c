"""Submission of operations: numbered when called, sent in that order, awaited in parallel."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from everstep.client._transport import otel, request_events
from everstep.client._transport.direct import FOLLOWING
from everstep.client._transport.http import body_of, read
from everstep.client._transport.long_poll import RequestInfo, retrieve
from everstep.client._transport.request_events import RequestEvent, notify_hooks
from everstep.client._transport.session import Session
from everstep.wire import types
from everstep.wire.base import Request, Response

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Response)
JSON = {"Content-Type": "application/json"}
_CREATING = ("CreateModel", "LoadWeights")


class SubmitQueue:
    """Assigns sequence ids and sends requests in their order.

    An id is claimed in the caller's thread, so that the order of calls is the order of execution.
    A request is sent once every request before it was acknowledged or refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_id = 1
        self._next_to_send = 1
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._sending: set[asyncio.Task[Any]] = set()

    def claim(self, build: Callable[[int], T], count: int = 1) -> tuple[int, T]:
        """Claim sequence ids for a request, in the calling thread.

        No id is claimed if ``build`` raises: a claimed id that is never sent would block all later
        operations.

        Args:
            build: called with the first id.
            count: how many ids to claim.

        Returns:
            The first id, and the return value of ``build``.
        """
        with self._lock:
            first = self._next_id
            built = build(first)
            self._next_id += count
            return first, built

    async def send(self, first: int, count: int, send: Callable[[], Awaitable[T]]) -> T:
        """Send a request when all requests before it are sent, then let the next one through.

        The request is sent even if the caller is cancelled, and a failure lets the next one through
        too: the service waits for a missing id, and all later requests would wait with it.

        Args:
            first: the first id that the request has claimed.
            count: how many ids it has claimed.
            send: sends it.
        """
        task = asyncio.create_task(self._send(first, count, send))
        self._sending.add(task)
        task.add_done_callback(self._sent)
        return await asyncio.shield(task)

    async def _send(self, first: int, count: int, send: Callable[[], Awaitable[T]]) -> T:
        if self._next_to_send != first:
            future = self._waiting[first] = asyncio.get_running_loop().create_future()
            await future
        try:
            return await send()
        finally:
            self._next_to_send = first + count
            following = self._waiting.pop(self._next_to_send, None)
            if following is not None:
                following.set_result(None)

    def _sent(self, task: asyncio.Task[Any]) -> None:
        self._sending.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: asyncio logs nothing if nobody waits for it


def encode_json(body: Request) -> bytes:
    """Encode a request as JSON.

    Raises:
        ValueError: it holds NaN or infinity, which JSON doesn't have.
    """
    content = body.model_dump(mode="json", exclude_none=True)
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class Accepted:
    """An accepted operation.

    Attributes:
        request_id: its future.
        following: its result, if the service sends it after the acceptance.
    """

    request_id: str
    following: asyncio.Future[bytes] | None


async def submit_followed(
    session: Session, path: str, content: bytes, headers: Mapping[str, str] = JSON
) -> Accepted:
    """Send an operation whose result may follow. See `submit`."""
    request_events.current().sent()
    response = await session.http.request(
        "POST", path, content=content, headers=headers, follow=True
    )
    future = read(types.UntypedAPIFuture, body_of(response))
    request_events.current().accepted()
    return Accepted(future.request_id, response.extensions.get(FOLLOWING))


async def submit(
    session: Session,
    path: str,
    content: bytes,
    headers: Mapping[str, str] = JSON,
    *,
    hand_back: Container[int] = (),
) -> types.UntypedAPIFuture:
    """Send an operation until it is accepted or refused. See `Http.request`."""
    request_events.current().sent()
    future = await session.http.call(
        "POST", path, types.UntypedAPIFuture, content=content, headers=headers, hand_back=hand_back
    )
    request_events.current().accepted()
    return future


async def send_chunks(
    send: Callable[[int], Awaitable[Accepted]], count: int, *, parallel: bool
) -> list[Accepted]:
    """Send the chunks of one operation: all but the first in parallel, then the first.

    The service starts with the first chunk, and has all others by then. Every chunk is sent, even
    if another one fails: a missing id would block all later operations.

    Args:
        send: sends the chunk of an index.
        count: how many chunks there are.
        parallel: False sends them one after the other, in order.

    Raises:
        TinkerError: of the first chunk that was refused.
    """
    if count == 1:
        return [await send(0)]
    answers: list[Accepted | BaseException] = []
    if parallel:
        later = await asyncio.gather(
            *(send(index) for index in range(1, count)), return_exceptions=True
        )
        answers = [*await asyncio.gather(send(0), return_exceptions=True), *later]
    else:
        for index in range(count):
            answers += await asyncio.gather(send(index), return_exceptions=True)
    futures = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        futures.append(answer)
    return futures


async def json_result(
    session: Session,
    accepted: Accepted,
    request_info: RequestInfo,
    answer: type[Answer],
) -> Answer:
    """Wait for a JSON result."""
    return await retrieve(
        session.connection,
        accepted.request_id,
        request_info,
        None,
        lambda body: read(answer, body),
        accepted.following,
    )


async def create(
    session: Session, path: str, request: Request, request_info: RequestInfo, answer: type[Answer]
) -> tuple[types.UntypedAPIFuture, Answer]:
    """Send an operation outside of any run's sequence, and wait for its result."""
    future = await submit(session, path, encode_json(request))
    accepted = Accepted(future.request_id, None)
    return future, await json_result(session, accepted, request_info, answer)


async def reported(
    session: Session,
    request_type: str,
    run_id: str | None,
    seq_id: int,
    work: Coroutine[Any, Any, T],
    sampler_id: str | None = None,
) -> T:
    """Await an operation, report it to hooks and traces, and report a failure to telemetry."""
    try:
        if session.hooks or otel.enabled():
            return await _observed(session, request_type, run_id, seq_id, work, sampler_id)
        return await work
    except Exception as error:
        if session.telemetry is not None:
            session.telemetry.log_exception_sync(error)
        raise


async def _observed(
    session: Session,
    request_type: str,
    run_id: str | None,
    seq_id: int,
    work: Coroutine[Any, Any, T],
    sampler_id: str | None,
) -> T:
    progress = request_events.Progress()
    request_events.progress.set(progress)
    error: BaseException | None = None
    session_id = ""
    with otel.span(request_type) as span:
        try:
            session_id = await _session_id(session, work)
            if run_id is None and request_type in _CREATING:
                run_id = f"{session_id}:train:{seq_id}"  # the protocol's rule
            return await work
        except BaseException as raised:
            error = raised
            raise
        finally:
            event = RequestEvent(
                request_type=request_type,
                session_id=session_id,
                run_id=run_id,
                seq_id=seq_id,
                duration_s=time.monotonic() - progress.begin,
                outcome="succeeded" if error is None else "failed",
                error=None if error is None else str(error) or type(error).__name__,
                queue_s=progress.queue_s or 0.0,
                accepted_s=progress.accepted_s,
                retries=progress.retries,
                polls=progress.polls,
                sampler_id=sampler_id,
            )
            otel.set_attributes(span, event)
            notify_hooks(session.hooks, event)


async def _session_id(session: Session, work: Coroutine[Any, Any, T]) -> str:
    """Return the session's id, opening the session if needed. Closes ``work`` if that fails."""
    try:
        return await session.id()
    except BaseException:
        work.close()
        raise
