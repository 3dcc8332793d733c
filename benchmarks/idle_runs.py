"""How much memory does a run take that nobody uses, beyond its state, in memory and evicted?

    python benchmarks/idle_runs.py [--quick] [--dir .]

Creates runs of the built-in model and trains each for a step: on a service that keeps all in
memory, then on one that has memory for three. Measured is by how much the private memory of service
and worker grows for a run, once they have given back what passes have left.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, run
from many_runs import MODEL, RANK, client_of, state_bytes, step

import everstep

IDLE_SECONDS = 8.0
"""More than a worker waits before it gives memory back."""
KEPT = 3


def growth(home: Path, runs: int, *settings: str) -> float:
    """Return the bytes by which the service and its worker grow for a run."""
    with client_of(home, *settings) as service:
        process = int((home / "ledger.sqlite.lock").read_text())
        use(service, max(2 * KEPT, runs // 2))
        time.sleep(IDLE_SECONDS)
        before = private_bytes(process)
        use(service, runs)
        time.sleep(IDLE_SECONDS)
        return (private_bytes(process) - before) / runs


def private_bytes(pid: int) -> int:
    """Return the memory that a process and its descendants wrote. What they share counts once.

    Pages of files are left out: how many processes share them changes with other services.
    """
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            total += int(line.split()[1]) * 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return total + sum(private_bytes(int(child)) for child in children)


def use(service: everstep.ServiceClient, count: int) -> None:
    """Create runs, and train each for a step."""
    for _ in range(count):
        step(service.create_lora_training_client(MODEL, rank=RANK, seed=1).result())


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    runs = 24 if arguments.quick else 120
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir) as name:
        home = Path(name)
        state = state_bytes(home / "measure")
        live = growth(home / "live", runs) - state
        yield Figure("a live idle run, beyond its state", live / 1e3, "kB", "100 kB", 100, 1.0)
        evicted = growth(home / "evicted", runs, f"memory_bytes={KEPT * state}")
        yield Figure("an evicted run", evicted / 1e3, "kB", "10 kB", 10, 1.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--dir", type=Path, default=Path(), help="where the homes are made")


if __name__ == "__main__":
    run(__doc__, measure, add_options)
