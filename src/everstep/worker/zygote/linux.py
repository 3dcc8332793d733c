"""Linux: system calls that Python's standard library has no function for."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_ARG_START = 45
"""Index of ``arg_start`` among the fields of ``/proc/self/stat`` that follow the command's name."""


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent: the process id of the parent. If it is gone already, this process ends at once.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def set_title(name: str, arguments: Sequence[str]) -> None:
    """Set the name and the arguments that the process list shows for this process.

    Args:
        name: shown as the command's name. 15 bytes at most.
        arguments: shown as its arguments. Cut to the length that the process was started with.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    with suppress(OSError, IndexError, ValueError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_START + 1])
        if 0 < start < end:
            text = b"\0".join(os.fsencode(argument) for argument in arguments)
            ctypes.memmove(start, text[: end - start - 1].ljust(end - start, b"\0"), end - start)


def thread_count() -> int:
    """The number of threads of this process."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def has_cuda_driver() -> bool:
    """Whether this process has initialised the CUDA driver, which no fork survives."""
    return "libcuda.so" in Path("/proc/self/maps").read_text()
