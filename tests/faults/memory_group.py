"""Memory group: a control group with a memory limit, where the kernel kills for real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_UNIFIED = ("memory.max", "memory.current", "max")
_LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "-1")


class MemoryGroup:
    """A control group.

    Args:
        directory: its directory in the control group file system.
        names: the files of its limit and of its usage, and the text that means no limit.
    """

    def __init__(self, directory: Path, names: tuple[str, str, str]) -> None:
        self._directory = directory
        self._limit, self._used, self._unlimited = names
        self.limit(None)

    def add(self, pid: int) -> None:
        """Move a process into the group, with all processes that it starts from now on."""
        (self._directory / "cgroup.procs").write_text(str(pid))

    def limit(self, size: int | None) -> None:
        """Limit the group's memory in bytes; None removes the limit."""
        (self._directory / self._limit).write_text(self._unlimited if size is None else str(size))

    @property
    def used(self) -> int:
        """The group's memory in bytes."""
        return int((self._directory / self._used).read_text())


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Create a group for the block; its processes must have ended at the block's end.

    Raises:
        OSError: the system doesn't allow it.
    """
    legacy = (_ROOT / "memory").is_dir()
    directory = (_ROOT / "memory" if legacy else _ROOT) / f"everstep-test-{os.getpid()}"
    directory.mkdir()
    try:
        yield MemoryGroup(directory, _LEGACY if legacy else _UNIFIED)
    finally:
        directory.rmdir()
