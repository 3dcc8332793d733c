"""Background I/O: writes and threads that let the work go first that somebody waits for.

`Writeback` has the kernel write a new file to the disk while the program still fills it. Without
it, gigabytes of dirty pages wait for the fsync, and whoever commits meanwhile waits with them.
`lower_priority` is for threads that write checkpoints or verify them.

None of this makes anything durable: that remains fsync's. Where a system lacks a call, nothing
happens. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import threading
from collections.abc import Callable

WINDOW = 16 << 20
"""Bytes of a file that may be on their way to the disk while more are written."""
_WAIT_BEFORE, _START, _WAIT_AFTER = 1, 2, 4
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE)
_MIN_BYTES = 4 << 20
_NICE = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_LOWEST_BEST_EFFORT = 2 << 13 | 7
_THIS_THREAD = 1
_thread = threading.local()


class Writeback:
    """Starts writing a file's pages as they are filled, and bounds how many are under way.

    Args:
        handle: the file, opened for writing and empty.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._started = 0
        self._ended = 0

    def wrote(self, end: int) -> None:
        """Start the writeback of everything before an offset, and wait for what lies far back."""
        if end - self._started < _MIN_BYTES:
            return
        _tolerant(_sync_file_range, self._handle, self._started, end - self._started, _START)
        self._started = end
        behind = end - WINDOW
        if behind > self._ended:
            flags = _WAIT_BEFORE | _START | _WAIT_AFTER
            _tolerant(_sync_file_range, self._handle, self._ended, behind - self._ended, flags)
            self._ended = behind


def allocate(handle: int, size: int) -> None:
    """Reserve the blocks of a file that will be large.

    Args:
        handle: the file, opened for writing and empty.
        size: its size in bytes.

    Raises:
        OSError: the disk is full (ENOSPC, EDQUOT).
    """
    if size >= _MIN_BYTES:
        _tolerant(_fallocate, handle, 0, 0, size)


def lower_priority() -> None:
    """Have this thread, and those that it starts, leave processors and disk to others.

    A tenth of a busy processor is left to them, because somebody waits for a save too, and because
    a thread that gets nothing could keep a lock of the interpreter, or of the file system's
    journal, for as long as others are busy.
    """
    _thread.background = True
    if sys.platform != "linux":
        return  # elsewhere it would be the whole process
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        _tolerant(_syscall, number, _THIS_THREAD, 0, _LOWEST_BEST_EFFORT)


def is_background() -> bool:
    """Whether this thread has called `lower_priority`."""
    return getattr(_thread, "background", False)


def only_idle() -> None:
    """Have this thread run where a processor has nothing else to do.

    For a thread that computes and holds no lock. What waits for it bounds how long.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _function(name: str, *arguments: type) -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return None
    function.argtypes = arguments
    function.restype = ctypes.c_int
    found: Callable[..., int] = function
    return found


def _tolerant(function: Callable[..., int] | None, *arguments: int) -> None:
    """Call a function. Raises OSError, unless the system or the file system has no such call."""
    while function is not None and function(*arguments) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


_fallocate = _function("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _function(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_syscall = _function("syscall", *([ctypes.c_long] * 4))
