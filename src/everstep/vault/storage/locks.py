"""Locks between the processes that use a vault: ``flock`` on its directories.

root, shared       no garbage collection: a backup, or a writer that has no ledger
root, exclusive    a garbage collection
tmp, shared        files are written, or wait for their manifest
tmp, exclusive     a damaged file is moved to quarantine, while nothing can replace it

A lock ends with its process.
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
    def pausing_gc(self) -> Iterator[None]:
        """Keep every process from collecting garbage. Waits for a running collection."""
        with _flock(self._root, fcntl.LOCK_SH):
            yield

    @contextmanager
    def collecting(self) -> Iterator[bool]:
        """Lock for a garbage collection, without waiting. Yields whether it is locked."""
        with _flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
            yield locked

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock for writing files. Waits while a damaged file is moved away."""
        with _flock(self._root / "tmp", fcntl.LOCK_SH):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Lock to move a damaged file, without waiting. Yields whether it is locked."""
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
