"""Hooks: what the client tells of its requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic

_log = logging.getLogger("everstep.client")


@dataclass(frozen=True)
class RequestEvent:
    """One operation, from its call to its result.

    Attributes:
        request_type: ``ForwardBackward``, ``OptimStep``, ``SaveWeights``, ``LoadWeights``, ….
        session_id: the session.
        run_id: the run, also of the operation that creates it; None for a sample or a loss.
        seq_id: its sequence id; of what is created, its number in the session.
        duration_s: seconds from the call to the result.
        outcome: ``succeeded`` or ``failed``.
        error: why it failed.
        queue_s: seconds until it was sent: until its turn came, and there was room for it.
        accepted_s: seconds until the service had accepted all of it; None: it never did.
        retries: how often a part of it was sent again.
        polls: how often its result was asked for.
        sampler_id: the sampler; None for everything else.
    """

    request_type: str
    session_id: str
    run_id: str | None
    seq_id: int
    duration_s: float
    outcome: str
    error: str | None = None
    queue_s: float = 0.0
    accepted_s: float | None = None
    retries: int = 0
    polls: int = 0
    sampler_id: str | None = None


@dataclass
class Progress:
    """An operation under way. Shared by all tasks that work for it."""

    begin: float = field(default_factory=monotonic)
    queue_s: float | None = None
    accepted_s: float | None = None
    retries: int = 0
    polls: int = 0

    def sent(self) -> None:
        """A part of it is being sent; the first one ends its queueing."""
        if self.queue_s is None:
            self.queue_s = monotonic() - self.begin

    def accepted(self) -> None:
        """A part of it was accepted; the last one counts."""
        self.accepted_s = monotonic() - self.begin


progress: ContextVar[Progress] = ContextVar("everstep_progress")
"""Of the operation for which the current task works; tasks that it starts inherit it."""

Hook = Callable[[RequestEvent], None]


def current() -> Progress:
    """The progress of the operation for which the current task works."""
    return progress.get(None) or Progress()


def tell(hooks: Sequence[Hook], event: RequestEvent) -> None:
    """Call each hook; one that raises is logged and disturbs nothing."""
    for hook in hooks:
        try:
            hook(event)
        except Exception:  # noqa: BLE001  a hook is not our code
            _log.exception("a hook raised; the request is not affected")
