"""System memory: gives the allocator's unused memory back. Standard library only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def release_unused_memory() -> None:
    """Have glibc return the pages that it keeps for later allocations. No effect elsewhere.

    A worker keeps the memory of a pass for the next one (`everstep.worker.zygote.fit`), which is
    wasted while it has nothing to do. What is allocated is not touched.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_size_t,)
    function.restype = ctypes.c_int
    found: Callable[[int], int] = function
    return found


_malloc_trim = _find_malloc_trim()
