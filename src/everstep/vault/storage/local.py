"""Local storage: a vault's files in a directory.

A write creates a temporary file and fsyncs it, then renames it and fsyncs the directory. After a
failed fsync the temporary file is removed and the error raised (`everstep.durable_files`).
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from everstep.durable_files import Buffer, NewFile, sync_directory
from everstep.vault.storage.base import (
    DURABLE,
    NAMED,
    REMOVED,
    SYNCED,
    WRITTEN,
    NewContent,
    safe_key,
)
from everstep.vault.storage.direct import MIN_BYTES, write_direct

_READ = 1 << 20
_syncs = ThreadPoolExecutor(4, "fsync")  # kept, because to start a thread costs as much as a sync


class LocalStorage:
    """A directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / "tmp"
        self._known: set[Path] = set()
        self.make(self._temporary)

    def clean(self) -> None:
        """Remove the temporary files of interrupted writes."""
        for leftover in self._temporary.iterdir():
            leftover.unlink(missing_ok=True)

    def write(self, chunks: Iterable[Buffer], key_of: Callable[[], str], *, replace: bool) -> str:
        """Write a temporary file, fsync, rename, fsync the directory."""
        content = NewContent(chunks, key_of)
        with self._staged() as stage:
            stage.write(content)
            (target,) = stage.sync()
            self.make(target.path.parent)
            stage.name([target], replace=replace)
        return target.key

    def write_all(
        self, files: Sequence[NewContent], last: NewContent | None = None, *, replace: bool = True
    ) -> None:
        """Write all files, fsync them at once, rename them, fsync the directories at once.

        Directories that are used for the first time are fsynced together with those of the files.
        """
        with self._staged() as stage:
            for content in (*files, *([last] if last is not None else [])):
                stage.write(content)
            targets = stage.sync()
            stage.create_directories()
            stage.name(targets[: len(files)], replace=True)  # and the directory of the last one
            if last is not None:
                stage.name(targets[-1:], replace=replace)

    @contextmanager
    def _staged(self) -> Iterator[_Stage]:
        """Stage new files in ``tmp``. Removes those that have no name at the end."""
        stage = _Stage(self)
        try:
            yield stage
        finally:
            stage.close()

    def temporary(self) -> Path:
        """Return the path of a new temporary file."""
        return self._temporary / uuid.uuid4().hex

    def link(self, path: Path, key: str) -> None:
        """Add a hard link to a durable file of the same file system, durably."""
        temporary = self.temporary()
        target = self.path(key)
        self.make(target.parent)
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
        """Return the size of a file."""
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return None

    def modified(self, key: str) -> float:
        """Return a file's modification time."""
        return self.path(key).stat().st_mtime

    def keys(self, prefix: str) -> Iterator[str]:
        """List the files under a directory."""
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
        """Rename a file. Fsync the new directory first, then the old one."""
        source, target = self.path(key), self.path(to)
        self.make(target.parent)
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
        """Return the free bytes of the file system, 0 if it has no free inodes."""
        found = os.statvfs(self._root)
        return 0 if found.f_files and not found.f_favail else found.f_bavail * found.f_frsize

    def path(self, key: str) -> Path:
        """Return the path of a key's file."""
        return self._root / safe_key(key)

    def make(self, *directories: Path) -> None:
        """Create directories so that they survive a power cut.

        An existing one may come from a process that died before it synced it. So the first use of
        a directory always syncs its name.
        """
        unsure = self.create(*directories)
        for each in dict.fromkeys(each.parent for each in unsure):
            sync_directory(each)
        self.know(unsure)

    def create(self, *directories: Path) -> list[Path]:
        """Create directories. Returns those whose names may not be durable yet, outermost first.

        The caller syncs the parents of these, then calls `know`.
        """
        unsure: dict[Path, None] = {}
        for directory in directories:
            new = []
            parent = directory
            while parent not in self._known and (
                self._root in (parent, *parent.parents) or not parent.exists()
            ):
                new.append(parent)
                parent = parent.parent
            directory.mkdir(parents=True, exist_ok=True)
            unsure |= dict.fromkeys(reversed(new))
        return list(unsure)

    def know(self, directories: Iterable[Path]) -> None:
        """Record that the names of directories are durable."""
        self._known.update(directories)


@dataclass(frozen=True)
class _Target:
    """A durable temporary file, the key that it gets, and the path of that."""

    temporary: Path
    key: str
    path: Path


class _Stage:
    """Temporary files on their way to their names.

    Args:
        storage: the storage.
    """

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage
        self._open = ExitStack()
        self._written: list[tuple[Path, NewFile, NewContent]] = []
        self._targets: list[_Target] = []
        self._unsure: list[Path] = []

    def write(self, content: NewContent) -> None:
        """Write a content to a temporary file."""
        path = self._storage.temporary()
        file = self._open.enter_context(NewFile(path))
        self._written.append((path, file, content))
        if content.cold and (content.size or 0) >= MIN_BYTES:
            file.allocate(content.size or 0)
            write_direct(file.handle, content.chunks)
        else:
            file.write(content.chunks, content.size)
        WRITTEN()

    def sync(self) -> list[_Target]:
        """Make the contents durable.

        Fsyncs that are made at once share the commits of the file system's journal.
        """
        _at_once([file.sync for _, file, _ in self._written])
        self._open.close()
        for temporary, _, content in self._written:
            SYNCED()
            key = content.key_of()
            self._targets.append(_Target(temporary, key, self._storage.path(key)))
        return self._targets

    def create_directories(self) -> None:
        """Create the directories in which the files get their names. `name` makes them durable."""
        self._unsure = self._storage.create(*(each.path.parent for each in self._targets))

    def name(self, targets: Sequence[_Target], *, replace: bool) -> None:
        """Give files their names, durably, as those of all directories that were created."""
        for each in targets:
            if replace:
                each.temporary.replace(each.path)
            else:
                os.link(each.temporary, each.path)
                each.temporary.unlink()
            NAMED()
        unsure, self._unsure = self._unsure, []
        parents = [each.parent for each in unsure] + [each.path.parent for each in targets]
        if parents:
            _at_once([partial(sync_directory, each) for each in dict.fromkeys(parents)])
        self._storage.know(unsure)
        for _ in targets:
            DURABLE()

    def close(self) -> None:
        """Close the files, and remove those that have no name."""
        self._open.close()
        for path, _, _ in self._written:
            path.unlink(missing_ok=True)


def _at_once(calls: Sequence[Callable[[], None]]) -> None:
    """Make calls at once, the last one in this thread. Raises the first error when all ended."""
    *others, own = calls
    made = [_syncs.submit(call) for call in others]
    try:
        own()
    finally:
        wait(made)
    for each in made:
        each.result()
