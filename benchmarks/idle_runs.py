"""How much memory does a run take that nobody uses, beyond its state, in memory and evicted?

    python benchmarks/idle_runs.py [--quick] [--dir .]

Creates runs of the built-in model and trains each for a step: on a service that keeps all in
memory, then on one that has memory for three. Measured is by how much service and worker grow for
a run, once they have given back what passes have left.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, run
from many_runs import MODEL, RANK, client_of, state_bytes, step, used_mib

import everstep

IDLE_SECONDS = 8.0
"""More than a worker waits before it gives memory back."""
KEPT = 3


def growth(home: Path, runs: int, *settings: str) -> float:
    """Return the bytes by which the service and its worker grow for a run."""
    with client_of(home, *settings) as service:
        process = int((home / "ledger.sqlite.lock").read_text())
        use(service, max(2 * KEPT, runs // 3))
        time.sleep(IDLE_SECONDS)
        before = used_mib(process)
        use(service, runs)
        time.sleep(IDLE_SECONDS)
        return (used_mib(process) - before) * (1 << 20) / runs


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
