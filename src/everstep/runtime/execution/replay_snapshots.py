"""ReplaySnapshots: snapshots a run while it is replayed, so that repeated kills still converge.

Without them, a worker that is killed again before a replay ends would begin it anew each time. The
first snapshot is taken after half a second of replayed computation, the next after twice as much,
and so on up to a quarter of `replay_seconds`. So each life of a worker that lasts longer than the
first of them keeps about half of what it replayed or more, and a replay that is not disturbed takes
few of them.
"""

from __future__ import annotations

from everstep.ledger import Operation
from everstep.runtime import ids
from everstep.runtime.execution import snapshots
from everstep.runtime.execution.run import SNAPSHOT_KEY, Run

FIRST_SECONDS = 0.5
"""Replayed computation before the first snapshot."""
MAX_SHARE = 0.25
"""The longest computation between two of them, as a share of `replay_seconds`."""


class ReplaySnapshots:
    """Decides after each replayed operation whether its run is snapshotted.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._since = 0.0
        self._interval = FIRST_SECONDS

    def begin(self) -> None:
        """Begin a replay."""
        self._since = 0.0
        self._interval = FIRST_SECONDS

    async def after(self, operation: Operation, seconds: float) -> None:
        """Snapshot the run, if that is due, after an operation whose result was the recorded one.

        Only a pass shows that the weights are right, because its losses were computed with them.
        The result of an optimizer step says nothing about the weights that it made. In another
        numeric environment, or without determinism, nothing shows it to the bit.

        Args:
            operation: the replayed operation. The run's position is its sequence id.
            seconds: its computation.

        Raises:
            WorkerLost: the worker ended.
        """
        run = self._run
        self._since += seconds
        verified = operation.kind == ids.FORWARD_BACKWARD and run.replays_exactly
        writing = SNAPSHOT_KEY in run.writes
        if self._since < self._interval or not verified or writing or run.snapshots_given_up:
            return
        await snapshots.take_in_background(run, run.position, replaying=True)
        self._since = 0.0
        longest = run.context.settings.replay_seconds * MAX_SHARE
        self._interval = max(min(2 * self._interval, longest), FIRST_SECONDS)
