"""Spools: bytes in memory outside the interpreter, which processes hand to each other."""

from __future__ import annotations

import os
import sys
import tempfile
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 30
"""Of one system call: Linux transfers no more than 2 GiB at a time."""


class Spool:
    """An unnamed file in memory, or a temporary one where the system has none in memory.

    Reading and writing it releases the interpreter's lock.
    """

    def __init__(self) -> None:
        if sys.platform == "linux":
            self.descriptor = os.memfd_create("everstep", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the bytes, which can take a while."""
        os.close(self.descriptor)

    def write(self, data: bytes) -> None:
        """Append data."""
        write_all(self.descriptor, data, self.size)
        self.size += len(data)


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
