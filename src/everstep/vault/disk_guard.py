"""Disk guard: refuses a save that doesn't fit before a byte of it is written."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from everstep.durable_files import Buffer
from everstep.vault.errors import DiskFull
from everstep.vault.storage.base import Storage

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNITS = ("KiB", "MiB", "GiB", "TiB")


class DiskGuard:
    """Checks that a storage has enough free space.

    Args:
        storage: the storage.
        path: its name in an error message.
        reserve_bytes: bytes that stay free, because the ledger and deletions need space too.
    """

    def __init__(self, storage: Storage, path: Path, reserve_bytes: int) -> None:
        self._storage = storage
        self._path = path
        self._reserve = reserve_bytes

    def check(self, size: int) -> None:
        """Raise `DiskFull` unless so many bytes fit and the reserve stays free."""
        free = self._storage.free()
        needed = size + self._reserve
        if free is not None and free < needed:
            raise self._full(
                needed,
                free,
                f"there is no room for {readable(size)} more: with the reserve of "
                f"{readable(self._reserve)} that takes {readable(needed)}, and "
                f"{readable(free)} are free",
            )

    @contextmanager
    def translating(self, size: int | None = None) -> Iterator[None]:
        """Translate ENOSPC and EDQUOT into `DiskFull`.

        Args:
            size: bytes to be written, if known.
        """
        try:
            yield
        except OSError as error:
            if isinstance(error, DiskFull) or error.errno not in _FULL:
                raise
            free = self._storage.free() or 0
            what = "a file" if size is None else readable(size)
            text = f"the disk became full while {what} was written; {readable(free)} are free"
            raise self._full(size or 0, free, text) from error

    def _full(self, needed: int, free: int, what: str) -> DiskFull:
        text = f"{self._path}: {what}. Delete checkpoints and run 'everstep vault gc', or give "
        return DiskFull(text + "the disk more room.", str(self._path), needed, free)


def size_of(chunks: Iterable[Buffer]) -> int | None:
    """Return the total bytes of chunks: their own ``nbytes``. None if they are generated."""
    if not isinstance(chunks, Sequence):
        size: int | None = getattr(chunks, "nbytes", None)
        return size
    return sum(memoryview(chunk).nbytes for chunk in chunks)


def readable(size: float) -> str:
    """Format a number of bytes: ``1.5 GiB``."""
    if abs(size) < 1024:
        return f"{size:.0f} bytes"
    units = list(_UNITS)
    while abs(size) >= 1024 and units:
        size /= 1024
        unit = units.pop(0)
    return f"{size:.1f} {unit}"
