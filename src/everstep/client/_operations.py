"""One run's operations: numbered at the call, sent in that order, awaited side by side."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from everstep.client._hooks import RequestEvent, tell
from everstep.client._http import read
from everstep.client._polling import retrieve
from everstep.client._session import Session
from everstep.wire.base import Request, Response
from everstep.wire.responses import UntypedAPIFuture

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Response)


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

    def take(self, count: int = 1) -> int:
        """Take ids in the calling thread; returns the first."""
        with self._lock:
            first = self._next_id
            self._next_id += count
            return first

    async def wait(self, seq_id: int) -> None:
        """Wait for an id's turn."""
        while self._turn != seq_id:
            future = self._waiting.setdefault(seq_id, asyncio.get_running_loop().create_future())
            await future

    def advance(self, seq_id: int) -> None:
        """Give the turn to an id."""
        self._turn = seq_id
        future = self._waiting.pop(seq_id, None)
        if future is not None and not future.done():
            future.set_result(None)


async def submit(
    session: Session,
    path: str,
    *,
    body: Request | None = None,
    content: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> UntypedAPIFuture:
    """Send an operation until it is accepted or refused."""
    json = None if body is None else body.model_dump(mode="json", exclude_none=True)
    return await session.http.call(
        "POST", path, UntypedAPIFuture, json=json, content=content, headers=headers
    )


async def in_turn(turns: Turns, first: int, count: int, send: Callable[[], Awaitable[T]]) -> T:
    """Send when it is the turn of ``first``; whatever comes of it, the next ids get theirs."""
    await turns.wait(first)
    try:
        return await send()
    finally:
        turns.advance(first + count)


async def json_result(session: Session, future: UntypedAPIFuture, answer: type[Answer]) -> Answer:
    """Wait for a JSON result."""
    return await retrieve(session.http, future.request_id, None, lambda body: read(answer, body))


async def told(
    session: Session,
    request_type: str,
    run_id: str | None,
    seq_id: int,
    work: Awaitable[T],
) -> T:
    """Await an operation and tell the hooks what came of it."""
    begin = time.monotonic()
    error: BaseException | None = None
    try:
        return await work
    except BaseException as raised:
        error = raised
        raise
    finally:
        if session.hooks:
            event = RequestEvent(
                request_type=request_type,
                session_id=await session.id(),
                run_id=run_id,
                seq_id=seq_id,
                duration_s=time.monotonic() - begin,
                outcome="succeeded" if error is None else "failed",
                error=None if error is None else str(error),
            )
            tell(session.hooks, event)


def tokenizer(tokenizer_id: str) -> Any:
    """A tokenizer by directory or hub id; needs transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_id)
