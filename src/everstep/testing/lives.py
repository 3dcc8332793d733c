"""Lives: a program runs on a disk again and again until a power cut, and the disk is checked."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.failpoints import ONCE_VARIABLE, VARIABLE
from everstep.testing import invariants
from everstep.testing.crashfs import CrashFS
from everstep.testing.history import History, Value, Violation
from everstep.testing.nursery import Child, Nursery

WORKLOAD = "everstep.testing.workload:live"
Check = Callable[[Path, History], tuple[list[Violation], dict[str, Value]]]
_PATIENCE = 60.0
_GLANCE = 0.002


@dataclass
class End:
    """How a life ended.

    Attributes:
        reached: whether it reached the chosen moment.
        acknowledged: number of changes that were acknowledged in this life.
        pending: number of changes without an end.
        failures: changes that failed while there was power.
        violations: broken invariants.
    """

    reached: bool
    acknowledged: int
    pending: int
    failures: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)


class Lives:
    """One home on one disk, and the programs that live on it, one after the other.

    Args:
        nursery: starts the processes.
        disk: the disk whose power is cut.
        target: the program, as for `Nursery.start`.
        check: checks the home afterwards.
    """

    def __init__(
        self,
        nursery: Nursery,
        disk: CrashFS,
        *,
        target: str = WORKLOAD,
        check: Check = invariants.check,
    ) -> None:
        self._nursery = nursery
        self._disk = disk
        self._target = target
        self._check = check
        self.history = History()

    @property
    def home(self) -> Path:
        """The home of the program, which creates it."""
        return self._disk.root / "home"

    def until_failpoint(self, name: str, nth: int, **arguments: Any) -> End:
        """Cut the power while the program hangs in a failpoint for the n-th time."""
        fired = Path(tempfile.mkdtemp(prefix="fired-"))
        environment = {VARIABLE: f"{name}=hang@{nth}", ONCE_VARIABLE: str(fired)}
        try:
            return self._live(environment, arguments, (fired / name).exists)
        finally:
            shutil.rmtree(fired)

    def until_paused(self, **arguments: Any) -> End:
        """Cut the power when the program says that it pauses, or has done all."""
        return self._live({}, arguments, lambda: self.history.paused)

    def until(self, seconds: float, **arguments: Any) -> End:
        """Cut the power some time after the program's first report."""
        before = self.history.acknowledged  # in the lives so far
        began: list[float] = []

        def due() -> bool:
            if not began and (self.history.pending or self.history.acknowledged > before):
                began.append(time.monotonic())
            return bool(began) and time.monotonic() - began[0] >= seconds

        return self._live({}, arguments, due)

    def _live(
        self, environment: Mapping[str, str], arguments: dict[str, Any], due: Callable[[], bool]
    ) -> End:
        before = self.history.acknowledged
        everything = {"home": str(self.home), **arguments}
        child = self._nursery.start(self._target, everything, environment=environment)
        try:
            reached = self._wait(child, due)
            self.history.feed(child.lines(0))
            failures = list(self.history.failures)
            self._disk.power_off()
            self.history.feed(child.kill(), heard=False)
        finally:
            child.close()
        self._disk.power_on()
        end = End(reached, self.history.acknowledged - before, len(self.history.pending), failures)
        end.violations, found = self._check(self.home, self.history)
        self.history.restart_from(found)
        return end

    def _wait(self, child: Child, due: Callable[[], bool]) -> bool:
        """Until it is due, or the program is through."""
        deadline = time.monotonic() + _PATIENCE
        while not due():
            self.history.feed(child.lines(_GLANCE))
            if child.ended:
                return due()
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {_PATIENCE} s the program is where it was")
        return True
