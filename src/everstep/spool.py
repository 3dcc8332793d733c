"""Spools: bytes outside of the interpreter's memory, which processes and threads hand on.

The interpreter frees a large object with its lock held, 64 MiB in 6 ms, and copies most of them so.
A spool is written, mapped, hashed, copied to a file and freed without the lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Self

SPOOLED_BYTES = 1 << 20
"""Contents from this size on stay in spools. Smaller ones are cheaper as objects."""
_CHUNK_BYTES = 1 << 30
"""Of one system call: Linux transfers no more than 2 GiB at a time."""


class Spool:
    """An unnamed file in memory, or a temporary one where the system has none in memory.

    Attributes:
        descriptor: of the file.
        size: bytes of its content.
    """

    def __init__(self) -> None:
        if sys.platform == "linux":
            self.descriptor = os.memfd_create("everstep", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self.size = 0

    def __del__(self) -> None:
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the bytes, which can take a while. A second call does nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def write(self, data: bytes) -> None:
        """Append data."""
        write_all(self.descriptor, data, self.size)
        self.size += len(data)

    def read(self) -> bytes:
        """Return a copy of its content."""
        return read_all(self.descriptor, self.size)

    @contextlib.contextmanager
    def mapped(self) -> Iterator[memoryview]:
        """Map its content, which is not copied, for the duration of the block."""
        with mapped_part(self.descriptor, 0, self.size) as view:
            yield view


Data = bytes | Spool
"""The bytes of a request or a result, in the interpreter's memory or outside of it."""


@contextlib.contextmanager
def viewed(data: Data) -> Iterator[memoryview]:
    """View bytes, wherever they are, for the duration of the block."""
    if isinstance(data, Spool):
        with data.mapped() as view:
            yield view
    else:
        yield memoryview(data)


def as_bytes(data: Data) -> bytes:
    """Return bytes, wherever they are. Those of a spool are copied."""
    return data.read() if isinstance(data, Spool) else data


async def taken(data: Data) -> bytes:
    """Return bytes, wherever they are. A spool is read and closed in a thread."""
    if not isinstance(data, Spool):
        return data
    try:
        return await asyncio.to_thread(data.read)
    finally:
        await freed(data)


async def freed(data: Data) -> None:
    """Close a spool in a thread: the system needs 10 ms and more for 64 MiB."""
    if isinstance(data, Spool):
        loop = asyncio.get_running_loop()
        await asyncio.shield(loop.run_in_executor(None, data.close))


@contextlib.contextmanager
def mapped_part(descriptor: int, offset: int, size: int) -> Iterator[memoryview]:
    """Map a part of a file for the duration of the block.

    The part has to be there: reading beyond the end of a file ends the process.

    Args:
        descriptor: of the file.
        offset: where the part begins.
        size: its bytes, at least 1.
    """
    before = offset % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(descriptor, before + size, access=mmap.ACCESS_READ, offset=offset - before)
    try:
        with memoryview(mapping) as whole, whole[before:] as view:
            yield view
    finally:
        with contextlib.suppress(BufferError):  # an error's traceback holds a view, and frees it
            mapping.close()


def write_all(descriptor: int, data: bytes, offset: int = 0) -> None:
    """Write data to a file at an offset."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest[:_CHUNK_BYTES], offset)
        rest, offset = rest[written:], offset + written


def read_all(descriptor: int, size: int) -> bytes:
    """Read a file's first bytes.

    Raises:
        EOFError: it has fewer.
    """
    parts = []
    offset = 0
    while offset < size:
        part = os.pread(descriptor, min(size - offset, _CHUNK_BYTES), offset)
        if not part:
            raise EOFError(f"a spool ends at {offset} of {size} bytes")
        parts.append(part)
        offset += len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]
