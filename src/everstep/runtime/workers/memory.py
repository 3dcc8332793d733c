"""Memory: how much there is, and whether the kernel killed for the lack of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def oom_kills() -> int:
    """How many processes of this control group the kernel killed for lack of memory so far."""
    for path in (*_files("memory.events", "memory.oom_control"), Path("/proc/vmstat")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def total_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's if that is less."""
    pages: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _files("memory.max", "memory.limit_in_bytes"):
        try:
            return min(pages, int(path.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return pages


def _files(unified: str, legacy: str) -> Iterator[Path]:
    """Where a file of this process's control group may be.

    Args:
        unified: its name in version 2.
        legacy: its name in version 1.
    """
    try:
        memberships = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        memberships = []
    for membership in memberships:
        _, controllers, group = membership.split(":", 2)
        if not controllers:
            yield _CGROUP / group.lstrip("/") / unified
        elif "memory" in controllers.split(","):
            yield _CGROUP / "memory" / group.lstrip("/") / legacy
    yield _CGROUP / unified  # a container may see its own group as the root, by another name
    yield _CGROUP / "memory" / legacy
