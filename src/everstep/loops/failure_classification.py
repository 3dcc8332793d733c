"""RecoveryPolicy: which failures mean that a run is lost, and how to recover it. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from everstep.backoff import Backoff
from everstep.client._transport.errors import (
    APIConnectionError,
    APIStatusError,
    LocalServiceError,
    RequestFailedError,
)
from everstep.loops.catalog import SavedCheckpoint
from everstep.loops.errors import CheckpointFailed, CheckpointNotConfirmed, RunLost
from everstep.loops.policy import best_first
from everstep.wire.errors import ErrorCategory

_AMBIGUOUS = (400, 404, 409)
"""Statuses of a wrong request, and of a valid one whose run or session no longer exists."""


class FailureClass(Enum):
    """Classification of a failure by the state of its run."""

    LOST = "lost"
    """The run is gone, or can't be trusted any more."""
    DOUBTFUL = "doubtful"
    """The service has to be asked whether it still has the run."""
    PERMANENT = "permanent"
    """It would fail again: wrong input, a wrong key, a missing checkpoint, a bug."""


@dataclass(frozen=True)
class RecoveryPolicy:
    """How to recover a lost run, and when to give up.

    Attributes:
        strategy: continue from the ``latest`` checkpoint that loads, or from the ``best``.
        metric: metric for ``best``.
        mode: whether the smallest (``min``) or the largest (``max``) is best.
        attempts: consecutive attempts without a newer checkpoint in between.
        seconds: total time since the first of those attempts.
        first_delay: seconds before the second attempt. Each further one doubles it.
        longest_delay: upper bound of the delay.
        watch_seconds: interval at which the run is checked while nothing fails. None: never.

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
            raise ValueError(f"strategy has to be 'latest' or 'best'; got {self.strategy!r}")
        if self.strategy == "best" and self.metric is None:
            raise ValueError("strategy 'best' needs a metric")
        if self.attempts < 1 or self.seconds <= 0:
            raise ValueError("attempts has to be 1 or more, and seconds above 0")
        if self.watch_seconds is not None and self.watch_seconds <= 0:
            raise ValueError(f"watch_seconds has to be above 0, or None; got {self.watch_seconds}")

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait before an attempt, counted from 1."""
        backoff = Backoff(self.first_delay, self.longest_delay)
        return backoff.delay(attempt - 2) if attempt > 1 else 0.0

    def candidates(self, checkpoints: Sequence[SavedCheckpoint]) -> list[SavedCheckpoint]:
        """Order the checkpoints to try: all of them, so that a bad one doesn't end the recovery.

        Args:
            checkpoints: of the run, oldest first.
        """
        newest_first = list(reversed(checkpoints))
        if self.strategy == "latest" or self.metric is None:
            return newest_first
        best = best_first(checkpoints, self.metric, self.mode)
        rated = {each.path for each in best}
        return best + [each for each in newest_first if each.path not in rated]


_MOST_SEVERE_FIRST = (FailureClass.PERMANENT, FailureClass.LOST, FailureClass.DOUBTFUL)


def describe(error: BaseException) -> str:
    """Return a failure's message, or the messages of a group's members."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(describe(each) for each in error.exceptions)
    return str(error)


def classify(error: BaseException) -> FailureClass:
    """Classify a failure by its meaning for the run."""
    match error:
        case BaseExceptionGroup(exceptions=several):  # of concurrent tasks
            classes = {classify(each) for each in several}
            return next(each for each in _MOST_SEVERE_FIRST if each in classes)
        case CheckpointFailed(__cause__=BaseException() as cause):
            return classify(cause)
        case RunLost() | APIConnectionError():
            return FailureClass.LOST
        case CheckpointNotConfirmed():
            return FailureClass.DOUBTFUL
        case LocalServiceError():
            return FailureClass.PERMANENT
        case APIStatusError(status_code=status):
            if status == 410 or status >= 500:
                return FailureClass.LOST
            return FailureClass.DOUBTFUL if status in _AMBIGUOUS else FailureClass.PERMANENT
        case RequestFailedError(category=ErrorCategory.USER):
            return FailureClass.DOUBTFUL  # services report lost runs differently
        case RequestFailedError():
            return FailureClass.LOST
    return FailureClass.PERMANENT
