"""Round-robin: queues of cooperative tasks, advanced one step each in rotation.

A task is a generator that yields between steps of bounded length (a micro-batch, a decode step).
Tasks of one lane (a run) run one after another. Lanes alternate after every step. So a long
operation delays a short one of another run by one step per lane, however long the operation is.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator

from everstep.worker.protocol.heartbeat import HeartbeatPage

Task = Generator[None, None, None]


class RoundRobin:
    """Queues of tasks by lane.

    Args:
        page: where the call of each step is recorded, if anywhere.
    """

    def __init__(self, page: HeartbeatPage | None = None) -> None:
        self._lanes: OrderedDict[str, deque[tuple[int, Task]]] = OrderedDict()
        self._page = page

    @property
    def busy(self) -> bool:
        """Whether a task is queued."""
        return bool(self._lanes)

    def add(self, lane: str, call_id: int, task: Task) -> None:
        """Queue a call's task behind the others of its lane."""
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
