"""RecoveryPolicy: which failures mean that a run is lost, and what to do about it. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from everstep.client._catalogue import SavedCheckpoint
from everstep.client._errors import (
    APIConnectionError,
    APIStatusError,
    LocalServiceError,
    RequestFailedError,
)
from everstep.client.checkpoint_policy import best_first
from everstep.client.loop_errors import CheckpointFailed, CheckpointNotConfirmed, RunLost
from everstep.wire.errors import ErrorCategory

_TELLS_LITTLE = (400, 404, 409)
"""Statuses of a wrong request, and of a right one whose run or session is no more."""


class Verdict(Enum):
    """What a failure says of its run."""

    LOST = "lost"
    """The run is gone, or can't be trusted any more."""
    DOUBTFUL = "doubtful"
    """The service has to be asked whether it still has the run."""
    PERMANENT = "permanent"
    """It would fail again: wrong input, a wrong key, a missing checkpoint, a bug."""


@dataclass(frozen=True)
class RecoveryPolicy:
    """How a lost run is brought back, and when to give up.

    Attributes:
        strategy: go on from the ``latest`` checkpoint that loads, or from the ``best``.
        metric: that ``best`` goes by.
        mode: whether the smallest (``min``) or the largest (``max``) is best.
        attempts: how often in a row, without a newer checkpoint in between.
        seconds: how long in all since the first of those.
        first_delay: seconds before the second attempt; they double.
        longest_delay: but are no more than this.
        watch_seconds: how often the run is looked at while nothing fails; None: never.

    Raises:
        ValueError: a number is out of bounds, or ``best`` has no metric.
    """

    strategy: Literal["latest", "best"] = "latest"
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    attempts: int = 5
    seconds: float = 3600.0
    first_delay: float = 1.0
    longest_delay: float = 60.0
    watch_seconds: float | None = 30.0

    def __post_init__(self) -> None:
        if self.strategy not in ("latest", "best"):
            raise ValueError(f"strategy is 'latest' or 'best'; got {self.strategy!r}")
        if self.strategy == "best" and self.metric is None:
            raise ValueError("the strategy 'best' needs a metric")
        if self.attempts < 1 or self.seconds <= 0:
            raise ValueError("attempts has to be 1 or more, and seconds above 0")
        if self.watch_seconds is not None and self.watch_seconds <= 0:
            raise ValueError(f"watch_seconds has to be above 0, or None; got {self.watch_seconds}")

    def delay(self, attempt: int) -> float:
        """Seconds to wait before an attempt, counted from 1."""
        doubled = self.first_delay * 2.0 ** min(attempt - 2, 30)
        return min(doubled, self.longest_delay) if attempt > 1 else 0.0

    def candidates(self, checkpoints: Sequence[SavedCheckpoint]) -> list[SavedCheckpoint]:
        """What to try, in order: all, so that a bad checkpoint is not the end.

        Args:
            checkpoints: of the run, oldest first.
        """
        newest_first = list(reversed(checkpoints))
        if self.strategy == "latest" or self.metric is None:
            return newest_first
        best = best_first(checkpoints, self.metric, self.mode)
        rated = {each.path for each in best}
        return best + [each for each in newest_first if each.path not in rated]


_GRAVEST_FIRST = (Verdict.PERMANENT, Verdict.LOST, Verdict.DOUBTFUL)


def told_of(error: BaseException) -> str:
    """What a failure says; of a group, what each of its members says."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(told_of(each) for each in error.exceptions)
    return str(error)


def judge(error: BaseException) -> Verdict:
    """Say what a failure means for its run."""
    match error:
        case BaseExceptionGroup(exceptions=several):  # of tasks that ran side by side
            verdicts = {judge(each) for each in several}
            return next(each for each in _GRAVEST_FIRST if each in verdicts)
        case CheckpointFailed(__cause__=BaseException() as cause):
            return judge(cause)
        case RunLost() | APIConnectionError():
            return Verdict.LOST
        case CheckpointNotConfirmed():
            return Verdict.DOUBTFUL
        case LocalServiceError():
            return Verdict.PERMANENT
        case APIStatusError(status_code=status):
            if status == 410 or status >= 500:
                return Verdict.LOST
            return Verdict.DOUBTFUL if status in _TELLS_LITTLE else Verdict.PERMANENT
        case RequestFailedError(category=ErrorCategory.USER):
            return Verdict.DOUBTFUL  # services differ in how they tell of a lost run
        case RequestFailedError():
            return Verdict.LOST
    return Verdict.PERMANENT
