"""GC journal: the keys that are written or named while a garbage collection runs.

    <root>/gc.journal     one key a line. A collection empties it first

A writer appends a key before it gives a file that name, and before it checks that a file exists
that a new manifest will name. A collection reads the journal and removes a file under one exclusive
lock. So a file whose key was appended first is kept. If the file was removed first, the writer
creates it again, or finds that it is missing and raises an error.

The journal needs no fsync: a collection that died is not resumed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "gc.journal"


class GcJournal:
    """The journal of one vault, shared by all processes that use it.

    Args:
        root: the vault's directory.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / NAME

    def note(self, *keys: str) -> None:
        """Append keys. Waits while a collection decides about a file.

        Raises:
            OSError: the journal can't be written, as on a full disk. The caller must not go on.
        """
        lines = "".join(f"\n{key}\n" for key in keys).encode()  # a torn line before them ends here
        with self._locked(fcntl.LOCK_SH) as handle:
            if os.write(handle, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    @contextmanager
    def begin(self) -> Iterator[JournalReader]:
        """Empty the journal for a collection. Only one may run at a time."""
        with self._locked(fcntl.LOCK_EX) as handle:
            os.ftruncate(handle, 0)
        yield JournalReader(self)

    @contextmanager
    def _locked(self, operation: int) -> Iterator[int]:
        handle = self._open()
        try:
            fcntl.flock(handle, operation)
            yield handle
        finally:
            os.close(handle)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(self._path, flags)
        except FileNotFoundError:
            pass
        try:
            return os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:  # another process created it
            return os.open(self._path, flags)


class JournalReader:
    """Reads the keys that were appended since a collection began.

    Args:
        journal: the journal.
    """

    def __init__(self, journal: GcJournal) -> None:
        self._journal = journal
        self._offset = 0
        self._keys: set[str] = set()

    @contextmanager
    def deciding(self, key: str) -> Iterator[bool]:
        """Lock out all writers while the caller decides about a file.

        Args:
            key: the file that may be removed inside.

        Yields:
            Whether the key was appended since the collection began.
        """
        with self._journal._locked(fcntl.LOCK_EX) as handle:
            while part := os.pread(handle, 1 << 20, self._offset):
                complete = part.rpartition(b"\n")[0]
                if not complete:
                    break  # a torn line: its writer raised, and named nothing
                self._offset += len(complete) + 1
                self._keys.update(complete.decode(errors="replace").split("\n"))
            yield key in self._keys
