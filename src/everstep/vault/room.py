"""The disk guard: a save that can't fit is refused before a byte of it is written."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from everstep.vault.errors import DiskFull
from everstep.vault.storage import Buffer, Storage

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNITS = ("KiB", "MiB", "GiB", "TiB")


class Room:
    """Looks whether a storage has room.

    Args:
        storage: the storage.
        path: what to call it in an error.
        reserve_bytes: what has to stay free: the ledger and deletions need room as well.
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
    def told(self, size: int | None = None) -> Iterator[None]:
        """Turn the system's word that the disk is full into ours.

        Args:
            size: how much was to be written, where that is known.
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
    """Bytes of all chunks; None when they are made one by one."""
    if not isinstance(chunks, Sequence):
        return None
    return sum(memoryview(chunk).nbytes for chunk in chunks)


def readable(size: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    if abs(size) < 1024:
        return f"{size:.0f} bytes"
    units = list(_UNITS)
    while abs(size) >= 1024 and units:
        size /= 1024
        unit = units.pop(0)
    return f"{size:.1f} {unit}"
