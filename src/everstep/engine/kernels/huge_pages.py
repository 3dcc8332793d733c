"""Huge pages: memory that is read or written as a whole, in pages of megabytes where there are any.

A page table's entry for each 4 KiB costs time: at their first touch, and whenever a core reads on
into the next page. Linux has both requests; elsewhere, and where the system refuses, pages stay
small.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

MIN_BYTES = 4 << 20
"""Size of a block from which its pages matter."""
_COLLAPSE = 25
"""MADV_COLLAPSE of Linux 6.1."""


def advise(address: int, nbytes: int) -> None:
    """Ask for huge pages in a block of memory that has not been touched yet."""
    _call(address, nbytes, getattr(mmap, "MADV_HUGEPAGE", None))


def collapse(address: int, nbytes: int) -> None:
    """Move a block of memory that is in use into huge pages."""
    _call(address, nbytes, _COLLAPSE)


def _call(address: int, nbytes: int, advice: int | None) -> None:
    if nbytes < MIN_BYTES or _madvise is None or advice is None:
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise(begin, end - begin, advice)


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found: Callable[[int, int, int], int] = function
    return found


_madvise = _find_madvise()
