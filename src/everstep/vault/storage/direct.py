"""Direct writes: large files that nobody reads soon go to the disk past the system's file cache.

A write through the cache copies each byte into pages that the system finds, fills, writes back and
takes back, for which it needs as much memory as the file and much of a processor. A direct write
needs neither: the disk reads the program's memory, where that and its place in the file begin at a
block. What does not passes through two stages, of which one is filled while the other is written.

Durable is such a file after its fsync only, as any other.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from everstep.durable_files import Buffer
from everstep.vault.storage.base import as_bytes

MIN_BYTES = 16 << 20
"""Size from which a file is written directly."""
STAGE = 4 << 20
BLOCK = 4096
"""Alignment, in memory and in the file, of what is written where it lies."""
_FLAG: int | None = getattr(os, "O_DIRECT", None)
_writes = ThreadPoolExecutor(2, "direct write")
_unused: list[tuple[memoryview, memoryview]] = []
_lock = threading.Lock()


def write_direct(handle: int, chunks: Iterable[Buffer]) -> None:
    """Write a file's content past the file cache, or through it where the system can't.

    Args:
        handle: the file, opened for writing and empty.
        chunks: the content. A chunk's buffer may be reused once the next one is requested.

    Raises:
        OSError: the file can't be written.
    """
    _set_direct(handle, wanted=True)
    with _stages() as stages:
        writer = _Writer(handle, stages)
        try:
            for chunk in chunks:
                writer.add(as_bytes(chunk))
        finally:  # nothing may write from a stage that others use
            writer.wait()
        writer.finish()


class _Writer:
    """A file that is written directly, from its beginning.

    Args:
        handle: the file.
        stages: what is not aligned passes through them.
    """

    def __init__(self, handle: int, stages: tuple[memoryview, memoryview]) -> None:
        self._handle = handle
        self._stage, self._other = stages
        self._filled = 0
        self._writing: Future[None] | None = None

    def add(self, view: memoryview) -> None:
        """Write a chunk where it lies, or copy it to a stage. Writes a stage that is full."""
        if self._filled % BLOCK == 0 and _is_aligned(view):
            self._confirm()
            _write(self._handle, self._stage[: self._filled])
            whole = len(view) - len(view) % BLOCK
            _write(self._handle, view[:whole])
            view, self._filled = view[whole:], 0
        while len(view):
            part = view[: len(self._stage) - self._filled]
            end = self._filled + len(part)
            _copy(part, self._stage[self._filled : end])
            view, self._filled = view[len(part) :], end
            if end == len(self._stage):
                self._confirm()
                self._writing = _writes.submit(_write, self._handle, self._stage)
                self._stage, self._other, self._filled = self._other, self._stage, 0

    def _confirm(self) -> None:
        """Wait for the stage that is being written. Raises its error."""
        if self._writing is not None:
            self._writing.result()

    def wait(self) -> None:
        """Wait until nothing is being written, whether that succeeds or not."""
        if self._writing is not None:
            wait([self._writing])

    def finish(self) -> None:
        """Write what is left. The last bytes, less than a block, go through the cache."""
        self._confirm()
        whole = self._filled - self._filled % BLOCK
        _write(self._handle, self._stage[:whole])
        _set_direct(self._handle, wanted=False)
        _write(self._handle, self._stage[whole : self._filled])


def _write(handle: int, view: memoryview) -> None:
    """Write bytes. Through the cache from where the system refuses to write them directly."""
    while len(view):
        try:
            count = os.write(handle, view)
        except OSError as error:
            if error.errno != errno.EINVAL or not _set_direct(handle, wanted=False):
                raise
            continue
        view = view[count:]  # the system refuses to go on within a block


def _set_direct(handle: int, *, wanted: bool) -> bool:
    """Set whether writes are direct. Returns whether that changed it."""
    if _FLAG is None:
        return False
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if bool(flags & _FLAG) == wanted:
        return False
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags ^ _FLAG)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False  # this file system has no such writes
    return True


def _copy(source: memoryview, target: memoryview) -> None:
    """Copy bytes without the interpreter's lock: a step of training may need it meanwhile."""
    import numpy as np

    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _aligned() -> memoryview:
    return memoryview(mmap.mmap(-1, STAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _is_aligned(view: memoryview) -> bool:
    """Whether a chunk of some blocks can be written where it lies."""
    import numpy as np

    return len(view) >= BLOCK and np.frombuffer(view, np.uint8).ctypes.data % BLOCK == 0


@contextmanager
def _stages() -> Iterator[tuple[memoryview, memoryview]]:
    """Take two stages. They are kept for the next file, because fresh memory costs more."""
    with _lock:
        pair = _unused.pop() if _unused else None
    if pair is None:
        pair = (_aligned(), _aligned())
    try:
        yield pair
    finally:
        with _lock:
            _unused.append(pair)
