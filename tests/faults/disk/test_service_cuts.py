"""P3 during power cuts: service, worker and disk stop at once, and clients get the same results.

Unmodified clients run on another machine, in the middle of their rounds. The home is on a disk
that loses all data that was not on the device. A commit cuts at a fifth of the failpoints, which
its hash chooses, and `make soak` at all of them.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tinker

import everstep
import everstep.server
import everstep.worker.commands
from everstep import failpoints
from everstep.testing.crashfs import CrashFS, scratch
from everstep.testing.devices import why_not
from tests.conftest import Service
from tests.faults.cycle import Looper, Setbacks, uninterrupted
from tests.faults.disk.limits import SOAK, rounds
from tests.faults.keeper import Keeper
from tests.faults.rotation import share_of_commit
from tests.faults.test_failpoints import POINTS, check_all_listed_load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200 + 3 * SOAK),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
SIZE = 256 << 20
CHOSEN = [name for name in POINTS if SOAK or name.split(".")[0] in ("runtime", "worker")]
"""`test_power_cuts` covers the failpoints of vault and ledger with hundreds of cuts."""
SHARES = 5
RANDOM_CUTS = 6 if SOAK else 3
SEEDS = {everstep: 21, tinker: 22}


class Machine:
    """A machine with one disk that runs the service.

    Args:
        disk: holds its home.
        directory: for files that survive a cut: logs, and the failpoints that fired.
    """

    def __init__(self, disk: CrashFS, directory: Path) -> None:
        self._disk = disk
        self._directory = directory
        self._armed: str | None = None
        self.keeper = Keeper(
            disk.root / "home",
            "replay_seconds=0.2",
            f"disk_reserve_bytes={1 << 20}",
            "worker_attempts=1000",  # a worker is killed again and again until it hangs
            environment=self._arming,
            log=directory / "service.log",
        )

    def arm(self, failpoint: str | None) -> None:
        """Let the next started service hang at a failpoint."""
        self._armed = failpoint

    def hangs(self) -> bool:
        """Return whether the service hangs at the failpoint."""
        return self._armed is not None and (self._marks() / self._armed).exists()

    def lose_power(self) -> None:
        """Cut the power, and start the machine again."""
        self._disk.power_off()
        self.keeper.pause()
        self.keeper.wait_until(self._powered_on)
        starts = self.keeper.starts
        self.keeper.resume()
        self.keeper.wait_until(lambda: self.keeper.starts > starts)

    def _powered_on(self) -> bool:
        """Switch the power on. Fails until the kernel has closed the files of killed processes."""
        try:
            self._disk.power_on()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def _arming(self, start: int) -> dict[str, str]:
        if self._armed is None:
            return {}
        self._marks().mkdir(exist_ok=True)
        return {
            failpoints.VARIABLE: f"{self._armed}=hang",
            failpoints.ONCE_VARIABLE: str(self._marks()),
        }

    def _marks(self) -> Path:
        return self._directory / f"fired-{self._armed}"


@contextmanager
def machine(directory: Path) -> Iterator[Machine]:
    """Yield a machine, and switch it off at the end."""
    with CrashFS(scratch(), size=SIZE) as disk:
        running = Machine(disk, directory)
        with running.keeper:
            yield running


def run_through(victim: Machine, service: Service, cuts: Callable[[list[Looper]], None]) -> None:
    """Run clients during power cuts, then check their results and the checkpoints."""
    loopers = [Looper(sdk, victim.keeper.url, seed) for sdk, seed in SEEDS.items()]
    done = threading.Event()

    def run_rounds(looper: Looper) -> list[Any]:
        seen = []
        while not done.is_set():
            seen.append(looper.round())
        return seen

    with ThreadPoolExecutor(len(loopers)) as pool:
        running = [pool.submit(run_rounds, looper) for looper in loopers]
        try:
            cuts(loopers)
        finally:
            done.set()
        seen = [each.result() for each in running]
    for looper in loopers:
        check_all_listed_load(victim.keeper.home, looper.listed())
        looper.close()
    for (sdk, seed), numbers in zip(SEEDS.items(), seen, strict=True):
        assert numbers, "a client completed no round"
        assert numbers == uninterrupted(sdk, service.url, seed, len(numbers))


@pytest.mark.long(reason="starts of a service on a disk, one a failpoint")
def test_power_cut_at_every_failpoint_of_the_service_loses_nothing(
    tmp_path: Path, service: Service
) -> None:
    chosen = share_of_commit(CHOSEN, SHARES, "failpoints")
    assert chosen
    for _ in rounds():
        with machine(tmp_path) as victim:
            run_through(victim, service, partial(cut_at_each, victim, chosen))


def cut_at_each(victim: Machine, names: list[str], loopers: list[Looper]) -> None:
    """Cut the power where the service hangs. The next service hangs at the next failpoint."""
    victim.arm(names[0])
    victim.keeper.kill()
    for name, following in zip(names, [*names[1:], None], strict=True):
        if name.startswith("runtime.recover"):
            victim.keeper.wait_until(partial(hangs_over, victim, Setbacks(victim.keeper, loopers)))
        else:
            victim.keeper.wait_until(victim.hangs)
        victim.arm(following)
        victim.lose_power()


def hangs_over(victim: Machine, setbacks: Setbacks) -> bool:
    """Return whether the service hangs during recovery. If not, cause the next setback."""
    if not victim.hangs():
        setbacks.next()
    return victim.hangs()


@pytest.mark.long(reason="a service process and a disk for each cut")
def test_power_cut_at_random_moments_loses_nothing(tmp_path: Path, service: Service) -> None:
    for chance in rounds():
        with machine(tmp_path) as victim:
            run_through(victim, service, partial(cut_at_random, victim, chance))


def cut_at_random(victim: Machine, chance: random.Random, loopers: list[Looper]) -> None:
    """Cut the power at moments drawn from the seed."""
    for _ in range(RANDOM_CUTS):
        victim.keeper.wait_ready()
        threading.Event().wait(chance.uniform(0.0, 2.5))  # the moment is what is tested
        victim.lose_power()
