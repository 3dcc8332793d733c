"""RecoveryQueue: decides which run is brought back next.

A restart, or the loss of a worker, leaves many runs to restore and replay. One run at a time is
brought back: first the runs that a client waits for, the longest without progress first, then the
others in the order in which they came. A client that begins to wait for a run puts it before the
runs that nobody waits for, even before the one that is being brought back: that one pauses before
its next operation.
"""

from __future__ import annotations

import asyncio
from itertools import count


class RecoveryQueue:
    """A priority queue of the runs that are being brought back."""

    def __init__(self) -> None:
        self._order = count()
        self._queued: dict[str, int] = {}
        self._wanted: dict[str, int] = {}
        self._waiters: dict[str, asyncio.Future[None]] = {}
        self._closed = False

    def __contains__(self, run_id: object) -> bool:
        """Whether a run is being brought back, or waits for its turn."""
        return run_id in self._queued

    def want(self, run_id: str) -> None:
        """Record that a client waits for a run. The first call counts."""
        self._wanted.setdefault(run_id, next(self._order))
        self._wake_first()

    def renew(self, run_id: str) -> None:
        """Record that a run made progress. If clients wait for it, they begin to wait anew."""
        if self._wanted.pop(run_id, None) is not None:
            self.want(run_id)

    def unwant(self, run_id: str) -> None:
        """Record that no client waits for a run."""
        self._wanted.pop(run_id, None)

    async def turn(self, run_id: str) -> bool:
        """Wait until no other run goes before this one.

        The run holds its turn until it calls `leave`. A run that replays many operations calls
        this before each, so that a run that a client waits for can go before it.

        Returns:
            False when the service stops.
        """
        self._queued.setdefault(run_id, next(self._order))
        while not self._closed and self._first() != run_id:
            waiter = self._waiters[run_id] = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                del self._waiters[run_id]
        return not self._closed

    def leave(self, run_id: str) -> None:
        """Take a run out of the queue. One that is not in it changes nothing."""
        if self._queued.pop(run_id, None) is not None:
            self._wake_first()

    def close(self) -> None:
        """Bring no more runs back."""
        self._closed = True
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_result(None)

    def _priority(self, run_id: str) -> tuple[bool, int]:
        wanted = self._wanted.get(run_id)
        return (False, wanted) if wanted is not None else (True, self._queued[run_id])

    def _first(self) -> str | None:
        return min(self._queued, key=self._priority, default=None)

    def _wake_first(self) -> None:
        waiter = self._waiters.get(self._first() or "")
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
