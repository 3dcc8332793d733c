"""CheckpointPolicy: when a loop saves, and which checkpoints it keeps. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from everstep.loops.catalog import SavedCheckpoint
from everstep.loops.state import is_number


@dataclass(frozen=True)
class CheckpointPolicy:
    """When a loop saves, and which of its checkpoints it keeps.

    Attributes:
        every_steps: save after this number of steps since the last save.
        every_seconds: save after this time since the last save.
        keep_last: number of newest checkpoints to keep. None: all, or one if ``keep_best`` is
            given.
        keep_best: number of best checkpoints by ``metric`` to keep as well.
        metric: name of a metric that the loop passes to its saves.
        mode: whether the smallest (``min``) or the largest (``max``) is best.
        ttl: a safety net for abandoned runs: checkpoints expire this long after the loop's last
            activity. It is renewed while the loop runs, and cleared at the end. Services have a
            minimum, usually an hour.

    Raises:
        ValueError: a number is out of bounds, or ``keep_best`` has no metric.
    """

    every_steps: int | None = None
    every_seconds: float | None = None
    keep_last: int | None = None
    keep_best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    ttl: timedelta | int | None = None

    def __post_init__(self) -> None:
        positive = {
            "every_steps": self.every_steps,
            "every_seconds": self.every_seconds,
            "keep_last": self.keep_last,
            "ttl": self.ttl_seconds,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ValueError(f"CheckpointPolicy.{name} has to be above 0; got {value}")
        if self.keep_best < 0:
            raise ValueError(
                f"CheckpointPolicy.keep_best has to be 0 or more; got {self.keep_best}"
            )
        if self.keep_best and self.metric is None:
            raise ValueError("CheckpointPolicy.keep_best needs a metric")
        if self.mode not in ("min", "max"):
            raise ValueError(f"CheckpointPolicy.mode has to be 'min' or 'max'; got {self.mode!r}")

    @property
    def ttl_seconds(self) -> int | None:
        """The time to live in seconds."""
        return int(self.ttl.total_seconds()) if isinstance(self.ttl, timedelta) else self.ttl

    def due(self, steps: int, seconds: float) -> bool:
        """Return whether to save, given the steps and seconds since the last save."""
        by_steps = self.every_steps is not None and steps >= self.every_steps
        return by_steps or (self.every_seconds is not None and seconds >= self.every_seconds)

    def kept(self, checkpoints: Sequence[SavedCheckpoint]) -> list[SavedCheckpoint]:
        """Select the checkpoints to keep, in the same order.

        Args:
            checkpoints: of one run, oldest first. The newest one is always kept.
        """
        if self.keep_last is None and not self.keep_best:
            return list(checkpoints)
        keep = {each.path for each in checkpoints[-(self.keep_last or 1) :]}
        if self.metric is not None:
            best = best_first(checkpoints, self.metric, self.mode)
            keep |= {each.path for each in best[: self.keep_best]}
        return [each for each in checkpoints if each.path in keep]


def best_first(
    checkpoints: Sequence[SavedCheckpoint], metric: str, mode: Literal["min", "max"]
) -> list[SavedCheckpoint]:
    """Sort the checkpoints with a finite metric, best first and newer first among equals."""
    sign = 1.0 if mode == "min" else -1.0
    rated = [each for each in reversed(checkpoints) if is_number(each.metrics.get(metric))]
    return sorted(rated, key=lambda each: sign * each.metrics[metric])
