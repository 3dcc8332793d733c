"""Ends: how often an operation, a sample or a snapshot has ended the worker that executed it.

An operation that ends every worker is given up, or nothing else would ever be executed. An
operation that was executing when another process killed the worker may have done nothing wrong. The
two can't always be distinguished: a program that frees memory may kill the worker because of the
operation. So such a kill counts as a small part of an attempt.
"""

from __future__ import annotations

from dataclasses import dataclass

from everstep.runtime.errors import WorkerLost

KILLS_PER_ATTEMPT = 10
"""So many kills from outside weigh as much as one end that what was executed brought about."""


@dataclass
class WorkerEnds:
    """Counts the ends of workers that one piece of work is blamed for.

    Attributes:
        own: crashes, hangs, and kills by the kernel for lack of memory.
        kills: kills by others.
    """

    own: int = 0
    kills: int = 0

    def count(self, lost: WorkerLost) -> None:
        """Count an end, if the work was being executed."""
        if lost.blamed:
            self.own += not lost.killed
            self.kills += lost.killed

    def reach(self, attempts: int) -> bool:
        """Return whether the work has used up its attempts."""
        return self.own + self.kills / KILLS_PER_ATTEMPT >= attempts

    @property
    def total(self) -> int:
        """How many ends were counted."""
        return self.own + self.kills
