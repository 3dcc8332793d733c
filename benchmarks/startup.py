"""How long does a service take to start, and to be ready again after a crash?

    python benchmarks/startup.py [--rounds N] [--idle-only]

Measures a service that forks its workers from a zygote and one that spawns them, in turns, on a
new home each: from the start of the process until it says that it is ready, from SIGKILL of the
worker until the next one is ready, and from SIGKILL of the service until its successor on the same
home is. Each on the machine as it is, and with all cores kept busy. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

READY = "everstep: ready at "
WORKER_READY = "worker ready"
METHODS = {"fork": "", "spawn": "off"}
KINDS = ("start", "worker killed", "service killed")
PATIENCE_SECONDS = 300.0


class Service:
    """A service process.

    Args:
        home: its home directory.
        method: how it starts workers.
    """

    def __init__(self, home: Path, method: str) -> None:
        self._log = home.with_suffix(".log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("EVERSTEP_ZYGOTE", None)
        if METHODS[method]:
            environment["EVERSTEP_ZYGOTE"] = METHODS[method]
        command = [sys.executable, "-m", "everstep.cli", "serve", "--home", str(home)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0"], stdout=log, stderr=log, env=environment
            )

    def wait_ready(self) -> None:
        """Wait until the service says that it is ready."""
        wait_until(lambda: READY in self._log.read_text())

    def replace_worker(self) -> None:
        """Kill the worker, and wait until another one is ready."""
        before = self._log.read_text().count(WORKER_READY)
        os.kill(self._worker(), signal.SIGKILL)
        wait_until(lambda: self._log.read_text().count(WORKER_READY) > before)

    def kill(self) -> None:
        """Kill the service. Its worker and its zygote end with it."""
        self.process.kill()
        self.process.wait()

    def _worker(self) -> int:
        pids = [self.process.pid]
        while pids:  # the service's children, and theirs
            pid = pids.pop()
            if b"everstep.worker.main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        raise RuntimeError("the service has no worker")


def wait_until(found: Callable[[], bool]) -> None:
    """Poll every 5 ms."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not found():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing happened within {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.005)


def seconds(action: Callable[[], None]) -> float:
    """Return how long an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(home: Path, method: str) -> dict[str, float]:
    """Measure one service."""
    found = {}
    begin = time.perf_counter()
    service = Service(home, method)
    try:
        service.wait_ready()
        found["start"] = time.perf_counter() - begin
        time.sleep(1.5)  # a worker that ends within its first second is replaced after a delay
        found["worker killed"] = seconds(service.replace_worker)
        begin = time.perf_counter()
        service.kill()
        service = Service(home, method)
        service.wait_ready()
        found["service killed"] = time.perf_counter() - begin
    finally:
        service.kill()
    return found


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with a process that computes."""
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for each in spinning:
            each.kill()
            each.wait()


def report(title: str, rounds: int) -> None:
    """Measure both methods in turns, and print a table."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds):
            for method in METHODS:
                for kind, taken in measure(Path(directory) / f"{method}-{number}", method).items():
                    found[method, kind].append(taken)
    load = os.getloadavg()[0]
    print(f"\n{title} (load average {load:.1f}, {rounds} rounds, medians)")
    print(f"{'':<16}{'forked':>10}{'spawned':>10}{'ratio':>8}")
    for kind in KINDS:
        forked, spawned = (statistics.median(found[method, kind]) for method in METHODS)
        print(f"{kind:<16}{forked:>8.2f} s{spawned:>8.2f} s{spawned / forked:>8.1f}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle-only", action="store_true")
    arguments = parser.parse_args()
    report("the machine as it is", arguments.rounds)
    if not arguments.idle_only:
        with busy_cores():
            report("every core busy", arguments.rounds)


if __name__ == "__main__":
    main()
