"""Durable files: writes that are whole or absent after a crash, and survive a power cut.

A file is durable when its content was fsynced, its name when its directory was. A failed fsync is
never tried again on the same file, because the kernel may have marked its pages clean: the error
is raised, and the write begins again with a new file. Standard library only.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from everstep.background_io import Writeback, allocate

Buffer = bytes | bytearray | memoryview
_WRITE_BYTES = 8 << 20


def sync_file(path: Path) -> None:
    """Make the content of a file durable. Its name is durable after `sync_directory`."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(root: Path) -> None:
    """Make every file and every name below a directory durable, and the names in it."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(directory) / name)
        sync_directory(Path(directory))


class NewFile:
    """A new file that is written, then fsynced. Its name is durable after `sync_directory`.

    Args:
        path: the file, which must not exist.
        mode: the permissions.

    Raises:
        OSError: it can't be created.

    Attributes:
        handle: the open file, for content that is written in another way.
    """

    def __init__(self, path: Path, *, mode: int = 0o644) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.handle = os.open(path, flags, mode)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def allocate(self, size: int) -> None:
        """Reserve the blocks of a large file. Raises OSError: the disk is full."""
        allocate(self.handle, size)

    def write(self, chunks: Iterable[Buffer], size: int | None = None) -> None:
        """Write the content. The disk begins to receive it meanwhile.

        Args:
            chunks: the content. A chunk's buffer may be reused once the next one is requested.
            size: the bytes of all chunks, if known.

        Raises:
            OSError: the file can't be written. The caller removes the partial file.
        """
        writeback = Writeback(self.handle)
        if size is not None:
            self.allocate(size)
        end = 0
        for chunk in chunks:
            view = memoryview(chunk)
            view = view.cast("B") if view.nbytes else memoryview(b"")
            while len(view):
                count = os.write(self.handle, view[:_WRITE_BYTES])
                view = view[count:]
                end += count
                writeback.wrote(end)

    def sync(self) -> None:
        """Make the content durable. After an error it is not, and never will be in this file."""
        os.fsync(self.handle)


def write_new(path: Path, chunks: Iterable[Buffer], *, mode: int = 0o644) -> None:
    """Write a new file and fsync its content. Its name is durable after `sync_directory`.

    Args:
        path: the file, which must not exist.
        chunks: the content. A chunk's buffer may be reused once the next one is requested.
        mode: the permissions.

    Raises:
        OSError: the file can't be written. The caller removes the partial file.
    """
    with NewFile(path, mode=mode) as file:
        file.write(chunks)
        file.sync()


def replace_file(path: Path, content: Buffer, *, mode: int = 0o644) -> None:
    """Write a file, replacing an existing one. The file is durable on return.

    Readers see the old content or the new one, at any moment and after any crash.

    Args:
        path: the file.
        content: its new content.
        mode: the permissions.

    Raises:
        OSError: it can't be written. The old one is still there, or the new one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_new(temporary, [content], mode=mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
