"""Futures: one event loop on a thread of its own does all network work of a process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
import warnings
from collections.abc import Coroutine, Generator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
_log = logging.getLogger("everstep.client")


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

    def is_current(self) -> bool:
        """Whether the caller runs on it."""
        return _running_loop() is not None and _running_loop() is self._loop


_loop = _Loop()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def submit(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run a coroutine on the client's loop."""
    return asyncio.run_coroutine_threadsafe(work, _loop.get())


class APIFuture(Generic[T]):
    """The result of a request that is under way.

    ``result()`` waits in a thread, ``await`` in a coroutine. Neither a time-out nor the end of a
    coroutine that awaits cancels the request; ``future().cancel()`` gives its result up.
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
            RuntimeError: called on the client's own event loop, as from a hook: it would wait for
                itself for ever.
        """
        if not self._future.done() and _running_loop() is not None:
            if _loop.is_current():
                raise RuntimeError(
                    "result() waits; on the client's own event loop it would wait for ever"
                )
            _log.warning("result() blocks the event loop that it is called on; await the future")
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

    async def coroutine(self) -> T:
        """As a coroutine, for what takes no other awaitable."""
        return await self

    def done(self) -> bool:
        """Whether the result is there."""
        return self._future.done()


class ClientFuture(APIFuture[T]):
    """A client that is being created; used as the client itself, it waits for it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        warnings.warn(
            f"this is the future of a client; take its result() before you use .{name}",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(self.result(), name)


class ConcurrentAPIFuture(APIFuture[T], concurrent.futures.Future[T]):
    """A future of ours that is one of the standard library as well, as older scripts expect."""

    def __init__(self, future: concurrent.futures.Future[T]) -> None:
        APIFuture.__init__(self, future)
        concurrent.futures.Future.__init__(self)
        future.add_done_callback(self._copy)

    def cancel(self) -> bool:
        """Cancel the request."""
        return self._future.cancel()

    def _copy(self, future: concurrent.futures.Future[T]) -> None:
        if future.cancelled():
            concurrent.futures.Future.cancel(self)
            self.set_running_or_notify_cancel()
        elif (error := future.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(future.result())


class BackcompatTrainingClientFuture(ClientFuture[T]):
    """The future of a `TrainingClient`."""


class BackcompatSamplingClientFuture(ClientFuture[T]):
    """The future of a `SamplingClient`."""
