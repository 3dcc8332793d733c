"""Ctrl-C and SIGTERM as a request to stop. A second signal ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the process was asked to stop, and by which signal.

    Attributes:
        signal: the signal, or None if no stop was requested.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._wakes: SimpleQueue[None] = SimpleQueue()  # whose put is safe in a signal handler

    @property
    def exit_code(self) -> int:
        """Exit code of a process that the signal ended."""
        return 128 + (self.signal or 0)

    def wait(self, seconds: float) -> bool:
        """Wait until a stop is requested, `seconds` at most. Returns whether it was."""
        if self.signal is None:
            with suppress(Empty):
                self._wakes.get(timeout=seconds)
        return self.signal is not None

    def set(self, number: int) -> None:
        """Record a signal, and wake the wait."""
        self.signal = signal.Signals(number)
        self._wakes.put(None)


@contextmanager
def stop_requested(acknowledge: Callable[[], None]) -> Iterator[StopRequest]:
    """Turn the first signal inside the block into a request to stop.

    Args:
        acknowledge: called on the signal, to report that the stop takes a moment.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        request.set(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        acknowledge()

    before = {each: signal.signal(each, handle) for each in _SIGNALS}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
