"""Rotation: each commit runs a share of many equal cases, and `make soak` runs all of them.

The commit's hash chooses the share, so that it changes with every commit and is the same for
everyone who runs that one. `EVERSTEP_COMMIT=HASH` repeats the share of another commit.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

SOAK = bool(os.environ.get("EVERSTEP_SOAK"))
T = TypeVar("T")


def commit() -> str:
    """Return the hash that chooses; "0" where neither git nor the environment knows one."""
    named = os.environ.get("EVERSTEP_COMMIT")
    if named:
        return named
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "0"


def share_of_commit(cases: Sequence[T], shares: int, what: str) -> list[T]:
    """Return every n-th case, beginning where the commit says; in a soak, all.

    Args:
        cases: equal cases.
        shares: the number of shares that they are divided into.
        what: names the cases where the choice is printed.
    """
    if SOAK:
        return list(cases)
    chosen = commit()
    first = int(chosen, 16) % shares
    print(f"EVERSTEP_COMMIT={chosen}: {what} {first}, {first + shares}, … of {len(cases)}")
    return list(cases[first::shares])
