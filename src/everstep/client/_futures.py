"""Futures: one event loop on a thread of its own does all network work of a process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine, Generator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class _Loop:
    """The process's event loop; a forked child gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._loop = asyncio.new_event_loop()
                self._pid = os.getpid()
                threading.Thread(
                    target=self._loop.run_forever, name="everstep client", daemon=True
                ).start()
            return self._loop


_loop = _Loop()


def submit(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run a coroutine on the client's loop."""
    return asyncio.run_coroutine_threadsafe(work, _loop.get())


class APIFuture(Generic[T]):
    """The result of a request that is under way.

    ``result()`` waits in a thread, ``await`` in a coroutine. A time-out doesn't cancel the
    request.
    """

    def __init__(self, future: concurrent.futures.Future[T]) -> None:
        self._future = future

    @classmethod
    def of(cls, work: Coroutine[Any, Any, T]) -> Self:
        """Start a coroutine on the client's loop."""
        return cls(submit(work))

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: it took longer; the request goes on.
            TinkerError: the request failed.
        """
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:  # noqa: ASYNC109  theirs
        """Wait for the result in a coroutine; raises as `result` does."""
        async with asyncio.timeout(timeout):
            return await asyncio.shield(asyncio.wrap_future(self._future))

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def future(self) -> concurrent.futures.Future[T]:
        """As a future of the standard library."""
        return self._future

    def done(self) -> bool:
        """Whether the result is there."""
        return self._future.done()


class ClientFuture(APIFuture[T]):
    """A client that is being created; used as the client itself, it waits for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.result(), name)
