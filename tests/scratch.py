"""Scratch space: the tests' temporary directories, in memory where there is enough of it.

A service syncs its ledger and its vault several times a step, and a disk answers a few hundred
syncs a second, for all processes together. The tests kill processes and never the machine, and
what a killed process wrote is kept by the kernel on a disk and in memory alike. A machine with too
little memory, `--basetemp`, ``TMPDIR`` and ``PYTEST_DEBUG_TEMPROOT`` keep pytest's own choice.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")
VARIABLE = "PYTEST_DEBUG_TEMPROOT"
MIN_FREE_BYTES = 6 << 30
"""More than a whole run leaves at a time."""


def choose(config: pytest.Config) -> None:
    """Have pytest and the processes that it starts create temporary directories in memory."""
    chosen = config.option.basetemp or os.environ.get(VARIABLE) or os.environ.get("TMPDIR")
    if not chosen and free_bytes() >= MIN_FREE_BYTES:
        os.environ[VARIABLE] = str(MEMORY)


def free_bytes() -> int:
    """Return the memory that files may use, or 0 where files can't be kept in memory."""
    if not os.access(MEMORY, os.W_OK):
        return 0
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            available = int(value.split()[0]) << 10
    return min(shutil.disk_usage(MEMORY).free, available)
