"""ReplayBudget: bounds the replay after a restart, over all runs.

Each operation since a run's newest snapshot costs its seconds again after a crash. When the costs
of all runs together exceed the bound, the run with the largest cost is due for a snapshot, then
the next, until the rest is within the bound.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping


class ReplayBudget:
    """Accounts for the replay that each run would need, and says which run has to be snapshotted.

    Args:
        seconds: bound on the replay of all runs together.
        on_due: called with the id of a run that has to be snapshotted.
    """

    def __init__(self, seconds: float, on_due: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._on_due = on_due
        self._costs: defaultdict[str, float] = defaultdict(float)
        self._counted: set[str] = set()
        self._due: set[str] = set()
        self._writing: set[str] = set()

    @property
    def total(self) -> float:
        """Seconds of replay that no snapshot covers, written, being written or due."""
        return sum(cost for run_id, cost in self._costs.items() if run_id not in self._due)

    def add(self, run_id: str, seconds: float) -> None:
        """Add the cost of an operation."""
        self._counted.add(run_id)
        self._costs[run_id] += seconds
        self._balance()

    def seed(self, costs: Mapping[str, float]) -> None:
        """Set the costs that an earlier process left. A run in use is counted already."""
        for run_id in costs.keys() - self._counted:
            self._costs[run_id] = costs[run_id]
        self._balance()

    def reset(self, run_id: str, seconds: float) -> None:
        """Set a run's cost: it has a durable state, and this much to replay after it."""
        self._counted.add(run_id)
        if seconds:
            self._costs[run_id] = seconds
            self._balance()
        else:
            self._drop(run_id)

    def clear(self, run_id: str) -> None:
        """Drop a run's cost: it has ended, or can't be brought back or snapshotted."""
        self._counted.discard(run_id)
        self._drop(run_id)

    def is_due(self, run_id: str) -> bool:
        """Whether a run has to be snapshotted, and no snapshot of it is being written."""
        return run_id in self._due and run_id not in self._writing

    def begin_write(self, run_id: str, rest: float = 0.0) -> None:
        """Record that a snapshot is captured.

        Its run's cost begins anew. If the snapshot fails, the next one is due after as much
        computation again, so that a full disk is not tried at every operation.

        Args:
            run_id: the run.
            rest: seconds that are left of the replay in the course of which it is taken.
        """
        self._writing.add(run_id)
        self._drop(run_id)
        self.reset(run_id, rest)

    def end_write(self, run_id: str) -> None:
        """Record that a snapshot is durable, or failed."""
        self._writing.discard(run_id)
        self._balance()

    def _drop(self, run_id: str) -> None:
        self._costs.pop(run_id, None)
        self._due.discard(run_id)

    def _balance(self) -> None:
        while self.total > self._seconds:
            open_runs = self._costs.keys() - self._due - self._writing
            if not open_runs:
                return
            largest = max(open_runs, key=lambda run_id: (self._costs[run_id], run_id))
            self._due.add(largest)
            self._on_due(largest)
