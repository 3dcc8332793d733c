"""Loop events: notifications of checkpointers, resumptions and recoveries."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_log = logging.getLogger("everstep.client")
Kind = Literal[
    "saved",
    "save_failed",
    "deleted",
    "skipped",
    "resumed",
    "created",
    "lost",
    "attempt",
    "recovered",
    "gave_up",
    "group_whole",
]
_LEVELS = {
    "save_failed": logging.ERROR,
    "gave_up": logging.ERROR,
    "skipped": logging.WARNING,
    "lost": logging.WARNING,
    "attempt": logging.WARNING,
    "recovered": logging.WARNING,
}


@dataclass(frozen=True)
class LoopEvent:
    """A change of a loop's checkpoints or its run.

    Attributes:
        kind: ``saved`` (durable and confirmed), ``save_failed``, ``deleted`` (by the policy),
            ``skipped`` (a checkpoint that doesn't load), ``resumed``, ``created``, ``lost`` (the
            run), ``attempt`` (to recover it), ``recovered``, ``gave_up``, ``group_whole``.
        name: of the run or the group.
        path: of the checkpoint.
        step: of the loop.
        detail: an explanation.
    """

    kind: Kind
    name: str
    path: str | None = None
    step: int | None = None
    detail: str | None = None


OnEvent = Callable[[LoopEvent], None]


def emit(on_event: OnEvent | None, event: LoopEvent) -> None:
    """Log an event and pass it to the subscriber, whose errors are logged."""
    about = " ".join(str(part) for part in (event.path, event.detail) if part)
    level = _LEVELS.get(event.kind, logging.INFO)
    _log.log(level, "%s: %s %s", event.name, event.kind.replace("_", " "), about)
    if on_event is None:
        return
    try:
        on_event(event)
    except Exception:  # noqa: BLE001  a subscriber is user code
        _log.exception("on_event raised; the loop is not affected")
