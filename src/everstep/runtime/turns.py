"""Taking turns: lanes of cooperative tasks, one step each, round and round.

A task is a generator that yields between steps of bounded length (a micro-batch, a decode step).
Tasks of one lane (a run) follow one another; lanes alternate after every step. So a long
operation delays a short one of another run by one step a lane, however long the operation is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator

from everstep.runtime.progress import ProgressPage

Task = Generator[None, None, None]


class Turns:
    """A round-robin of lanes.

    Args:
        page: where the call of each step is written down; None: nowhere.
    """

    def __init__(self, page: ProgressPage | None = None) -> None:
        self._lanes: OrderedDict[str, deque[tuple[int, Task]]] = OrderedDict()
        self._page = page

    @property
    def busy(self) -> bool:
        """Whether any task waits."""
        return bool(self._lanes)

    def add(self, lane: str, call_id: int, task: Task) -> None:
        """Put a call's task behind the others of its lane."""
        self._lanes.setdefault(lane, deque()).append((call_id, task))

    def step(self) -> None:
        """Advance the next lane's first task by one step. A task handles its own errors."""
        lane, tasks = self._lanes.popitem(last=False)
        call_id, task = tasks[0]
        if self._page is not None:
            self._page.begin(call_id)
        try:
            next(task)
        except StopIteration:
            tasks.popleft()
        if tasks:
            self._lanes[lane] = tasks
        elif self._page is not None and not self._lanes:
            self._page.rest()
