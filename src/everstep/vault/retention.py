"""Retention: selects the checkpoints that a policy deletes. Pure: manifests in, manifests out.

A policy is applied to each run and kind separately. Each keeps at least one checkpoint that
verifies. If none verifies, nothing is deleted. Snapshots belong to the service and are never
selected.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from everstep.vault.manifest import Manifest


@dataclass(frozen=True)
class Policy:
    """The rules that keep checkpoints. One that no rule keeps is deleted.

    Attributes:
        keep_last: how many of the newest to keep.
        keep_best: how many of the best by a metric to keep.
        metric: key in ``user_metadata`` whose value is a number. A checkpoint without one is
            never among the best.
        mode: whether the smallest or the largest value is best.
        ttl: keep everything younger than this.
    """

    keep_last: int = 0
    keep_best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    ttl: timedelta | None = None

    def __post_init__(self) -> None:
        if self.keep_last < 0 or self.keep_best < 0:
            raise ValueError("A policy keeps the last 0 or more and the best 0 or more.")
        if self.keep_best and self.metric is None:
            raise ValueError("keep_best needs a metric: the name of a number in user_metadata.")
        if not (self.keep_last or self.keep_best or self.ttl):
            raise ValueError("A policy has to keep something: keep_last, keep_best or ttl.")


def to_delete(
    manifests: Iterable[Manifest],
    policy: Policy,
    *,
    now: datetime,
    good: Callable[[Manifest], bool],
) -> list[Manifest]:
    """Select the checkpoints to delete, oldest first.

    Args:
        manifests: checkpoints of any runs and kinds.
        policy: the rules that keep checkpoints.
        now: the current time.
        good: returns whether a checkpoint verifies. Called only as often as needed.
    """
    groups: dict[tuple[str, str], list[Manifest]] = defaultdict(list)
    for manifest in manifests:
        expired = manifest.expires_at is not None and manifest.expires_at <= now
        if manifest.kind != "snapshot" and not expired:
            groups[manifest.run_id, manifest.kind].append(manifest)
    gone = [each for group in groups.values() for each in _of_group(group, policy, now, good)]
    return sorted(gone, key=_age)


def metric_of(manifest: Manifest, name: str) -> float | None:
    """Return a number in a checkpoint's ``user_metadata``, or None if it isn't finite."""
    text = (manifest.user_metadata or {}).get(name)
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _of_group(
    group: list[Manifest], policy: Policy, now: datetime, good: Callable[[Manifest], bool]
) -> list[Manifest]:
    newest_first = sorted(group, key=lambda each: (each.position, _age(each)), reverse=True)
    kept = {each.id for each in newest_first[: policy.keep_last]}
    kept |= {each.id for each in _best(newest_first, policy)}
    if policy.ttl is not None:
        kept |= {each.id for each in group if now - each.created_at < policy.ttl}
    survivors = [each for each in newest_first if each.id in kept]
    doomed = [each for each in newest_first if each.id not in kept]
    if not doomed or any(good(each) for each in survivors):
        return doomed
    spared = next((each for each in doomed if good(each)), None)
    return [each for each in doomed if each is not spared] if spared is not None else []


def _best(newest_first: list[Manifest], policy: Policy) -> list[Manifest]:
    """Return the best by the metric, the newer one of equals first."""
    if policy.metric is None:
        return []
    sign = 1 if policy.mode == "min" else -1
    scored = [(metric_of(each, policy.metric), each) for each in newest_first]
    ranked = sorted(
        ((sign * value, each) for value, each in scored if value is not None),
        key=lambda pair: pair[0],
    )
    return [each for _, each in ranked[: policy.keep_best]]


def _age(manifest: Manifest) -> tuple[datetime, int, str, str, str]:
    return (manifest.created_at, manifest.position, *manifest.id)
