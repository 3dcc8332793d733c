"""Environment changes: how a run's numeric environment differs from the one it had before."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from everstep.ledger import Run

MAX_CHANGES = 16
"""Changes of a run's environment that are kept, the newest ones."""
_LONG = 60
"""Length of a text from which on only the words are named that came or went."""


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Describe by name how two environments differ."""
    return {
        name: _describe(before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }


def add_change(
    record: Run, environment: Mapping[str, Any], seq_id: int
) -> list[dict[str, Any]] | None:
    """Return the changes of a run's environment, with its newest one.

    Args:
        record: the run, in its former environment.
        environment: the environment that it goes on in.
        seq_id: the last operation that was computed in the former one.
    """
    if record.environment is None:
        return record.environment_changes
    change = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seq_id": seq_id,
        "changed": describe_changes(record.environment, environment),
    }
    return [*(record.environment_changes or []), change][-MAX_CHANGES:]


def _describe(old: Any, new: Any) -> str:
    if isinstance(old, str) and isinstance(new, str) and min(len(old), len(new)) > _LONG:
        before, after = set(old.split()), set(new.split())
        gone = [f"-{word}" for word in sorted(before - after)]
        return " ".join([*gone, *(f"+{word}" for word in sorted(after - before))])
    return f"{old} → {new}"
