"""Futures: the results of requests, which run on one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
_log = logging.getLogger("everstep.client")


class _Loop:
    """The process's event loop. A forked child gets its own."""

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

    def running(self) -> asyncio.AbstractEventLoop | None:
        """Return the loop if there is one. Takes no lock: finalizers run in the middle of all."""
        return self._loop if self._pid == os.getpid() else None

    def is_current(self) -> bool:
        """Return whether the caller runs on this loop."""
        return _running_loop() is not None and _running_loop() is self._loop


_loop = _Loop()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _is_interactive() -> bool:
    """Return whether this is a notebook or a shell: their cells run in a loop, and may block it.

    Python sets ``sys.ps1`` there, and so do IPython and its notebook kernels.
    """
    return hasattr(sys, "ps1")


def submit(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run a coroutine on the client's event loop."""
    return asyncio.run_coroutine_threadsafe(work, _loop.get())


def submit_from_finalizer(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine on the client's event loop, if that still runs. Safe in a finalizer."""
    loop = _loop.running()
    if loop is not None and not loop.is_closed():
        loop.call_soon_threadsafe(lambda: loop.create_task(work()))


class APIFuture(Generic[T]):
    """The result of a request in progress.

    ``result()`` waits in a thread, ``await`` in a coroutine. A timeout, or the cancellation of a
    coroutine that awaits it, does not cancel the request. ``future().cancel()`` does.
    """

    def __init__(self, future: concurrent.futures.Future[T]) -> None:
        self._future = future

    @classmethod
    def of(cls, work: Coroutine[Any, Any, T]) -> Self:
        """Start a coroutine on the client's event loop."""
        return cls(submit(work))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._outcome()}>"

    def _outcome(self) -> str:
        if not self._future.done():
            return "pending"
        if self._future.cancelled():
            return "cancelled"
        if (error := self._future.exception()) is not None:
            return f"failed: {error!r}"
        return repr(self._future.result())

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result. It blocks the caller's event loop, if one runs, with a warning.

        In a notebook or a shell, where that is usual, there is no warning.

        Args:
            timeout: seconds. None waits for ever.

        Raises:
            TimeoutError: the timeout expired. The request continues.
            TinkerError: the request failed.
            RuntimeError: called on the client's own event loop, for example in a hook. It would
                wait for itself for ever.
        """
        if not self._future.done() and _running_loop() is not None:
            if _loop.is_current():
                raise RuntimeError(
                    "result() waits: on the client's own event loop it would wait for ever"
                )
            if not _is_interactive():
                _log.warning(
                    "result() blocks the event loop that calls it: await the future instead"
                )
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:  # noqa: ASYNC109  the official SDK's signature
        """Wait for the result in a coroutine. Raises as `result` does."""
        async with asyncio.timeout(timeout):
            return await asyncio.shield(asyncio.wrap_future(self._future))

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def future(self) -> concurrent.futures.Future[T]:
        """Return it as a future of the standard library."""
        return self._future

    async def coroutine(self) -> T:
        """Return it as a coroutine, for functions that take no other awaitable."""
        return await self

    def done(self) -> bool:
        """Return whether the request is done."""
        return self._future.done()


class ClientFuture(APIFuture[T]):
    """The future of a client. Use of the client's attributes waits for it, with a warning."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        warnings.warn(
            f"this is the future of a client: call its result() before you use .{name}",
            FutureWarning,
            stacklevel=2,
        )
        return getattr(self.result(), name)


class ConcurrentAPIFuture(APIFuture[T], concurrent.futures.Future[T]):
    """An `APIFuture` that is also a future of the standard library, as older scripts expect."""

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
