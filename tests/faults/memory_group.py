"""A control group whose memory has a limit: what the kernel kills for the lack of it is real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNIFIED = ("memory.max", "memory.current", "max")
_LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "-1")


class MemoryGroup:
    """One that was made.

    Args:
        directory: where.
        names: of the files for its limit and for what it uses, and how no limit is written.
    """

    def __init__(self, directory: Path, names: tuple[str, str, str]) -> None:
        self._directory = directory
        self._limit, self._used, self._unlimited = names
        self.limit(None)

    def add(self, pid: int) -> None:
        """Have a process in it, and all that it starts from now on."""
        (self._directory / "cgroup.procs").write_text(str(pid))

    def limit(self, size: int | None) -> None:
        """Let them have so many bytes together; None: as many as they like."""
        (self._directory / self._limit).write_text(self._unlimited if size is None else str(size))

    @property
    def used(self) -> int:
        """How many bytes they have."""
        return int((self._directory / self._used).read_text())


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A group for as long as this lasts; its processes must have ended by then.

    Raises:
        OSError: none can be made here.
    """
    legacy = (_ROOT / "memory").is_dir()
    directory = (_ROOT / "memory" if legacy else _ROOT) / f"everstep-test-{os.getpid()}"
    directory.mkdir()
    try:
        yield MemoryGroup(directory, _LEGACY if legacy else _UNIFIED)
    finally:
        directory.rmdir()
