"""Memory: how much there is, and whether the kernel killed for the lack of it."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """How many processes of this control group the kernel killed for lack of memory so far."""
    for path, key in (
        (_CGROUP / "memory.events", "oom_kill"),
        (_CGROUP / "memory" / "memory.oom_control", "oom_kill"),
        (Path("/proc/vmstat"), "oom_kill"),
    ):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def total_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's if that is less."""
    pages: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        try:
            return min(pages, int(path.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return pages
