"""A vault's files in a directory; a write is whole or absent.

    1. write a temporary file, fsync it
    2. fsync the directory that will hold its name, once it has it: rename, then fsync

A failed fsync is never tried again on the same file: the kernel may have marked its pages clean.
The temporary file is removed and the error raised.
"""

from __future__ import annotations

import mmap
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from everstep.vault.storage import (
    DURABLE,
    NAMED,
    REMOVED,
    SYNCED,
    WRITTEN,
    Buffer,
    as_bytes,
    safe_key,
)

_CHUNK = 8 << 20
_READ = 1 << 20


class LocalStorage:
    """A directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / "tmp"
        self._known: set[Path] = set()
        self._lock = threading.Lock()
        self._make(self._temporary)

    def clean(self) -> None:
        """Remove the temporary files that a crash left. For the one process that writes."""
        for leftover in self._temporary.iterdir():
            leftover.unlink(missing_ok=True)

    def write(self, chunks: Iterable[Buffer], key_of: Callable[[], str], *, replace: bool) -> str:
        """Write a temporary file, fsync, rename, fsync the directory."""
        temporary = self._temporary / uuid.uuid4().hex
        try:
            write_synced(temporary, chunks)
            SYNCED()
            key = key_of()
            target = self.path(key)
            self._make(target.parent)
            if replace:
                temporary.replace(target)
            else:
                os.link(temporary, target)
                temporary.unlink()
            NAMED()
            sync_directory(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        DURABLE()
        return key

    def link(self, path: Path, key: str) -> None:
        """Give a durable file of the same file system a second name here, durably."""
        temporary = self._temporary / uuid.uuid4().hex
        target = self.path(key)
        self._make(target.parent)
        os.link(path, temporary)
        temporary.replace(target)
        sync_directory(target.parent)

    def read(self, key: str) -> memoryview:
        """Map a file."""
        with self.path(key).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def chunks(self, key: str, *, start: int = 0, cold: bool = False) -> Iterator[memoryview]:
        """Read a file through one buffer."""
        with self.path(key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            buffer = memoryview(bytearray(min(max(size, 1), _READ)))
            while count := file.readinto(buffer):
                yield buffer[:count]
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def size(self, key: str) -> int | None:
        """The size of a file."""
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return None

    def modified(self, key: str) -> float:
        """When a file was written."""
        return self.path(key).stat().st_mtime

    def keys(self, prefix: str) -> Iterator[str]:
        """All files under a directory."""
        for path in sorted(self.path(prefix.removesuffix("/")).rglob("*")):
            if path.is_file():
                yield path.relative_to(self._root).as_posix()

    def delete(self, key: str) -> bool:
        """Unlink a file, fsync its directory."""
        target = self.path(key)
        try:
            target.unlink()
        except FileNotFoundError:
            return False
        REMOVED()
        sync_directory(target.parent)
        return True

    def move(self, key: str, to: str) -> bool:
        """Rename a file; fsync the directory that has it now, then the one that had it."""
        source, target = self.path(key), self.path(to)
        self._make(target.parent)
        try:
            source.replace(target)
        except FileNotFoundError:
            return False
        sync_directory(target.parent)
        sync_directory(source.parent)
        return True

    def sync(self, prefix: str) -> None:
        """Fsync the directories."""
        directory = self.path(prefix.removesuffix("/"))
        for each in (directory, *directory.rglob("*")):
            if each.is_dir():
                sync_directory(each)

    def free(self) -> int:
        """Bytes of the file system that a user may take; none when it has no inodes left."""
        found = os.statvfs(self._root)
        return 0 if found.f_files and not found.f_favail else found.f_bavail * found.f_frsize

    def path(self, key: str) -> Path:
        """Where a key's file lies."""
        return self._root / safe_key(key)

    def _make(self, directory: Path) -> None:
        """Create a directory so that it survives a power cut.

        One that is there may have been made by a process that died before it was synced: so the
        first use of a directory syncs its name, whoever made it.
        """
        with self._lock:
            unsure = []
            parent = directory
            while parent not in self._known and (
                self._root in (parent, *parent.parents) or not parent.exists()
            ):
                unsure.append(parent)
                parent = parent.parent
            directory.mkdir(parents=True, exist_ok=True)
            for each in reversed(unsure):
                sync_directory(each.parent)
                self._known.add(each)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write a new file and its content durably; its name is up to `sync_directory`."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            _write_all(file, chunk)
        WRITTEN()
        os.fsync(file)
    finally:
        os.close(file)


def _write_all(file: int, chunk: Buffer) -> None:
    view = as_bytes(chunk)
    while len(view):
        view = view[os.write(file, view[:_CHUNK]) :]
