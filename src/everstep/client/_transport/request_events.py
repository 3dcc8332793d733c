"""Request events: hooks that the client calls for its operations."""

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
        run_id: the run, even of the operation that creates it, or None for a sample or a loss.
        seq_id: its sequence id. For an operation that creates an object, the object's number in
            the session.
        duration_s: seconds from the call to the result.
        outcome: ``succeeded`` or ``failed``.
        error: the failure's message.
        queue_s: seconds until it was sent: until its turn came and the byte budget had room for it.
        accepted_s: seconds until the service had accepted all of it. None: it never did.
        retries: number of requests that were sent again.
        polls: number of requests for its result.
        sampler_id: the sampler, or None for other operations.
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
    """Timings and counters of an operation in progress, shared by all tasks that work for it."""

    begin: float = field(default_factory=monotonic)
    queue_s: float | None = None
    accepted_s: float | None = None
    retries: int = 0
    polls: int = 0

    def sent(self) -> None:
        """Record that a request is sent. The first one ends the time in the queue."""
        if self.queue_s is None:
            self.queue_s = monotonic() - self.begin

    def accepted(self) -> None:
        """Record that a request was accepted. The last one counts."""
        self.accepted_s = monotonic() - self.begin


progress: ContextVar[Progress] = ContextVar("everstep_progress")
"""Progress of the operation that the current task works for. Its child tasks inherit it."""

Hook = Callable[[RequestEvent], None]


def current() -> Progress:
    """Return the progress of the operation that the current task works for."""
    return progress.get(None) or Progress()


def notify_hooks(hooks: Sequence[Hook], event: RequestEvent) -> None:
    """Call each hook. An exception in a hook is logged and otherwise ignored."""
    for hook in hooks:
        try:
            hook(event)
        except Exception:  # noqa: BLE001  a hook is user code
            _log.exception("a hook raised; the request is not affected")
