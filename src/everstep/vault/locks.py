"""Locks between the processes that use a vault, on its directories. They end with their process.

root, shared       nothing may be collected: a backup, a copy of files elsewhere
root, exclusive    a collection
tmp, shared        files are being written, or wait for their manifest
tmp, exclusive     a damaged file is moved away: no one may just be replacing it
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Locks:
    """The locks of one vault.

    Args:
        root: its directory, which holds ``tmp``.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let no process collect; waits for a collection that goes on."""
        with _flock(self._root, fcntl.LOCK_SH):
            yield

    @contextmanager
    def collecting(self) -> Iterator[bool]:
        """Collect, unless someone holds the files; gives whether that is so."""
        with _flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
            yield locked

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write files; waits while a damaged one is moved away."""
        with _flock(self._root / "tmp", fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Move a damaged file away, unless someone writes; gives whether that is so."""
        with _flock(self._root / "tmp", fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
            yield locked


@contextmanager
def _flock(directory: Path, operation: int) -> Iterator[bool]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, operation)
            locked = True
        except BlockingIOError:
            locked = False
        yield locked
    finally:
        os.close(handle)
