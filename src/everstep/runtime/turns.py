"""Taking turns: lanes of cooperative tasks, one step each, round and round.

A task is a generator that yields between steps of bounded length (a micro-batch, a decode step).
Tasks of one lane (a run) follow one another; lanes alternate after every step. So a long
operation delays a short one of another run by one step a lane, however long the operation is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator

Task = Generator[None, None, None]


class Turns:
    """A round-robin of lanes."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, deque[Task]] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether any task waits."""
        return bool(self._lanes)

    def add(self, lane: str, task: Task) -> None:
        """Put a task behind the others of its lane."""
        self._lanes.setdefault(lane, deque()).append(task)

    def step(self) -> None:
        """Advance the next lane's first task by one step. A task handles its own errors."""
        lane, tasks = self._lanes.popitem(last=False)
        try:
            next(tasks[0])
        except StopIteration:
            tasks.popleft()
        if tasks:
            self._lanes[lane] = tasks
