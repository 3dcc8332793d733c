"""Ctrl-C and SIGTERM as a wish that a loop fulfils when it can; a second one ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether the process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """What a process that such a signal ended exits with."""
        return 128 + (self.signal or 0)


@contextmanager
def stop_wished(tell: Callable[[], None]) -> Iterator[Wish]:
    """Take the signals as a wish inside.

    Args:
        tell: says that it was understood, and will take a moment.
    """
    wish = Wish()

    def note(number: int, frame: FrameType | None) -> None:
        wish.signal = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        tell()

    before = {each: signal.signal(each, note) for each in _SIGNALS}
    try:
        yield wish
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
