"""Hooks: what the client tells of its requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_log = logging.getLogger("everstep.client")


@dataclass(frozen=True)
class RequestEvent:
    """One operation, from its call to its result.

    Attributes:
        request_type: ``ForwardBackward``, ``OptimStep``, ``SaveWeights``, ``LoadWeights``, ….
        session_id: the session.
        run_id: the run; None for a sample.
        seq_id: its sequence id.
        duration_s: seconds from the call to the result.
        outcome: ``succeeded`` or ``failed``.
        error: why it failed.
    """

    request_type: str
    session_id: str
    run_id: str | None
    seq_id: int
    duration_s: float
    outcome: str
    error: str | None = None


Hook = Callable[[RequestEvent], None]


def tell(hooks: Sequence[Hook], event: RequestEvent) -> None:
    """Call each hook; one that raises is logged and disturbs nothing."""
    for hook in hooks:
        try:
            hook(event)
        except Exception:  # noqa: BLE001  a hook is not our code
            _log.exception("a hook raised; the request is not affected")
