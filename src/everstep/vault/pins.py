"""Pins: the commands that are writing files to a vault, known to the process that sends them.

A file that was put is named by no manifest until its command commits one. A collection of garbage
(`everstep.vault.gc`) waits for the commands that it finds pinned, so that it removes none of their
files. Pins are held in memory: the one process that collects sends all commands, and a command
ends with the process that sent it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Pins:
    """The commands that are being executed. Safe to use from several threads."""

    def __init__(self) -> None:
        self._active: set[int] = set()
        self._latest = 0
        self._changed = threading.Condition()

    def add(self) -> int:
        """Pin a command before it is sent. Returns its pin."""
        with self._changed:
            self._latest += 1
            self._active.add(self._latest)
            return self._latest

    def remove(self, pin: int) -> None:
        """Remove the pin of a command that has ended: its manifest exists, or never will."""
        with self._changed:
            self._active.discard(pin)
            self._changed.notify_all()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Pin a command for the time of a block."""
        pin = self.add()
        try:
            yield
        finally:
            self.remove(pin)

    @property
    def active(self) -> frozenset[int]:
        """The pins of all commands that have not ended."""
        with self._changed:
            return frozenset(self._active)

    def wait(self, seconds: float) -> bool:
        """Wait until all commands that are pinned now have ended. Later ones don't matter.

        Args:
            seconds: how long to wait at most.

        Returns:
            Whether they have all ended.
        """
        with self._changed:
            waiting = set(self._active)
            return self._changed.wait_for(lambda: not waiting & self._active, seconds)
