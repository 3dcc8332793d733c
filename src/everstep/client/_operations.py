"""One run's operations: numbered at the call, sent in that order, awaited side by side."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping
from typing import Any, TypeVar

from everstep.client import _hooks, _tracing
from everstep.client._hooks import RequestEvent, tell
from everstep.client._http import read
from everstep.client._polling import Asked, retrieve
from everstep.client._session import Session
from everstep.wire.base import Request, Response
from everstep.wire.responses import UntypedAPIFuture

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Response)
JSON = {"Content-Type": "application/json"}
_CREATING = ("CreateModel", "LoadWeights")


class Turns:
    """Sequence ids, and whose turn it is to be sent.

    An id is taken in the caller's thread, so that the order of calls is the order of execution.
    A request is sent when all before it were acknowledged or refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_id = 1
        self._turn = 1
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._sending: set[asyncio.Task[Any]] = set()

    def place(self, build: Callable[[int], T], count: int = 1) -> tuple[int, T]:
        """Take ids in the calling thread for what is built with them; none when that raises.

        An id that was taken and never sent would hold up all later operations.

        Args:
            build: is given the first.
            count: how many are taken.

        Returns:
            The first, and what was built.
        """
        with self._lock:
            first = self._next_id
            built = build(first)
            self._next_id += count
            return first, built

    async def send(self, first: int, count: int, send: Callable[[], Awaitable[T]]) -> T:
        """Send when it is the turn of ``first``; whatever comes of it, the next ids get theirs.

        Who took a place keeps it: when the caller is cancelled, the request is sent all the same,
        because the service would wait for the missing id, and with it all later requests.
        """
        task = asyncio.create_task(self._send(first, count, send))
        self._sending.add(task)
        task.add_done_callback(self._sent)
        return await asyncio.shield(task)

    async def _send(self, first: int, count: int, send: Callable[[], Awaitable[T]]) -> T:
        if self._turn != first:
            future = self._waiting[first] = asyncio.get_running_loop().create_future()
            await future
        try:
            return await send()
        finally:
            self._turn = first + count
            following = self._waiting.pop(self._turn, None)
            if following is not None:
                following.set_result(None)

    def _sent(self, task: asyncio.Task[Any]) -> None:
        self._sending.discard(task)
        if not task.cancelled():
            task.exception()  # where nobody waits any more, it needs no log


def encoded(body: Request) -> bytes:
    """A request as JSON.

    Raises:
        ValueError: it holds a number that JSON doesn't have.
    """
    content = body.model_dump(mode="json", exclude_none=True)
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


async def submit(
    session: Session,
    path: str,
    content: bytes,
    headers: Mapping[str, str] = JSON,
    *,
    hand_back: Container[int] = (),
) -> UntypedAPIFuture:
    """Send an operation until it is accepted or refused; see `Http.request`."""
    _hooks.current().sent()
    future = await session.http.call(
        "POST", path, UntypedAPIFuture, content=content, headers=headers, hand_back=hand_back
    )
    _hooks.current().accepted()
    return future


async def in_turn(turns: Turns, first: int, count: int, send: Callable[[], Awaitable[T]]) -> T:
    """Send when it is the turn of ``first``; see `Turns.send`."""
    return await turns.send(first, count, send)


async def send_chunks(
    send: Callable[[int], Awaitable[UntypedAPIFuture]], count: int, *, parallel: bool
) -> list[UntypedAPIFuture]:
    """Send the parts of one operation: all but the first side by side, then the first.

    The service begins with the first, and then has the others at hand. Every part is sent
    whatever became of the others: a place that stays empty would hold up all later operations.

    Args:
        send: sends the part of that index.
        count: how many there are.
        parallel: else they are sent one after the other, in order.

    Raises:
        TinkerError: of the first part that was refused.
    """
    answers: list[UntypedAPIFuture | BaseException] = []
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
    session: Session, future: UntypedAPIFuture, asked: Asked, answer: type[Answer]
) -> Answer:
    """Wait for a JSON result."""
    return await retrieve(
        session.connection, future.request_id, asked, None, lambda body: read(answer, body)
    )


def place(
    session: Session,
    turns: Turns,
    path: str,
    build: Callable[[int], Request],
    asked: Asked,
    answer: type[Answer],
) -> tuple[int, Coroutine[Any, Any, Answer]]:
    """Take a place for a request, in the calling thread.

    Returns:
        The place, and what sends the request in its turn and awaits the result.

    Raises:
        ValueError: it can't be sent; no place was taken.
    """
    seq_id, content = turns.place(lambda seq_id: encoded(build(seq_id)))

    async def send() -> Answer:
        future = await in_turn(turns, seq_id, 1, lambda: submit(session, path, content))
        return await json_result(session, future, asked, answer)

    return seq_id, send()


async def create(
    session: Session, path: str, request: Request, asked: Asked, answer: type[Answer]
) -> tuple[UntypedAPIFuture, Answer]:
    """Send an operation that has no place in a run, and await its result."""
    future = await submit(session, path, encoded(request))
    return future, await json_result(session, future, asked, answer)


async def told(
    session: Session,
    request_type: str,
    run_id: str | None,
    seq_id: int,
    work: Coroutine[Any, Any, T],
    sampler_id: str | None = None,
) -> T:
    """Await an operation; tell the hooks what came of it, and telemetry of its failure."""
    try:
        if session.hooks or _tracing.on():
            return await _told_to_hooks(session, request_type, run_id, seq_id, work, sampler_id)
        return await work
    except Exception as error:
        if session.telemetry is not None:
            session.telemetry.log_exception_sync(error)
        raise


async def _told_to_hooks(
    session: Session,
    request_type: str,
    run_id: str | None,
    seq_id: int,
    work: Coroutine[Any, Any, T],
    sampler_id: str | None,
) -> T:
    under_way = _hooks.Progress()
    _hooks.progress.set(under_way)
    error: BaseException | None = None
    session_id = ""
    with _tracing.span(request_type) as span:
        try:
            session_id = await _opened(session, work)
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
                duration_s=time.monotonic() - under_way.begin,
                outcome="succeeded" if error is None else "failed",
                error=None if error is None else str(error) or type(error).__name__,
                queue_s=under_way.queue_s or 0.0,
                accepted_s=under_way.accepted_s,
                retries=under_way.retries,
                polls=under_way.polls,
                sampler_id=sampler_id,
            )
            _tracing.describe(span, event)
            tell(session.hooks, event)


async def _opened(session: Session, work: Coroutine[Any, Any, T]) -> str:
    """The session's id; at once where it is open, as it is for every operation of a run."""
    try:
        return await session.id()
    except BaseException:
        work.close()
        raise
