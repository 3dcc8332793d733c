"""Queue state: whether a service executes an operation or lets it wait."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from time import monotonic
from typing import Any

_log = logging.getLogger("everstep.client")
_LOG_SECONDS = 60.0


class QueueState(StrEnum):
    """State that a service reports for an unfinished operation."""

    ACTIVE = "active"
    PAUSED_RATE_LIMIT = "paused_rate_limit"
    PAUSED_CAPACITY = "paused_capacity"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> QueueState:
        return cls.UNKNOWN


QueueObserver = Callable[[QueueState, str | None], None]
_REASONS = {
    QueueState.PAUSED_RATE_LIMIT: "the service's concurrency limit is reached",
    QueueState.PAUSED_CAPACITY: "the service has no free capacity",
}


class PauseLog:
    """Logs a warning, at most once a minute, while an activity is paused.

    Args:
        activity: the paused activity, as the beginning of a sentence.
    """

    def __init__(self, activity: str) -> None:
        self._activity = activity
        self._logged = float("-inf")

    def __call__(self, queue_state: QueueState | str, queue_state_reason: str | None) -> None:
        """Handle a state that the service reported."""
        state = QueueState(queue_state)
        if state == QueueState.ACTIVE or monotonic() - self._logged < _LOG_SECONDS:
            return
        self._logged = monotonic()
        reason = queue_state_reason or _REASONS.get(state, "the service gave no reason")
        _log.warning("%s is paused: %s", self._activity, reason)


def notify_queue_state(observer: QueueObserver | None, answer: dict[str, Any]) -> None:
    """Pass the queue state of a ``try_again`` response to an observer, whose errors are logged."""
    state, reason = answer.get("queue_state"), answer.get("queue_state_reason")
    if observer is None or not (state or reason):
        return
    try:
        observer(QueueState(str(state)), reason)
    except Exception:  # noqa: BLE001  an observer may be the user's code
        _log.exception("on_queue_state_change raised; the request is not affected")
