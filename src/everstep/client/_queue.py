"""The service's queue: whether it takes an operation up, or lets it wait."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from time import monotonic
from typing import Any

_log = logging.getLogger("everstep.client")
_LOG_SECONDS = 60.0


class QueueState(StrEnum):
    """What a service says of an operation that is not finished."""

    ACTIVE = "active"
    PAUSED_RATE_LIMIT = "paused_rate_limit"
    PAUSED_CAPACITY = "paused_capacity"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> QueueState:
        return cls.UNKNOWN


QueueObserver = Callable[[QueueState, str | None], None]
_REASONS = {
    QueueState.PAUSED_RATE_LIMIT: "the service's limit of concurrent work is reached",
    QueueState.PAUSED_CAPACITY: "the service is short of capacity",
}


class PauseLog:
    """Says in the log, at most once a minute, that something is paused.

    Args:
        what: is paused, at the beginning of a sentence.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._logged = float("-inf")

    def __call__(self, queue_state: QueueState | str, queue_state_reason: str | None) -> None:
        """Note what the service says."""
        state = QueueState(queue_state)
        if state == QueueState.ACTIVE or monotonic() - self._logged < _LOG_SECONDS:
            return
        self._logged = monotonic()
        reason = queue_state_reason or _REASONS.get(state, "the service doesn't say why")
        _log.warning("%s is paused: %s", self._what, reason)


def tell_queue(observer: QueueObserver | None, answer: dict[str, Any]) -> None:
    """Pass on what a ``try_again`` says of the queue; an observer that raises disturbs nothing."""
    state, reason = answer.get("queue_state"), answer.get("queue_state_reason")
    if observer is None or not (state or reason):
        return
    try:
        observer(QueueState(str(state)), reason)
    except Exception:  # noqa: BLE001  an observer may be the user's code
        _log.exception("on_queue_state_change raised; the request is not affected")
