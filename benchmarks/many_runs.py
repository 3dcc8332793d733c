"""Measure the memory of many live runs, of which idle ones are evicted to the vault.

    python benchmarks/many_runs.py [RUNS]

Creates RUNS (default 2,000) runs on a service with memory for 20, trains each for a step, trains a
random hundred for another, and compares their losses with those of a run that was never evicted.
Prints the memory of the service and its worker after 20 runs and after all, and plots it.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving import serving

import everstep

MODEL = "everstep/pico"
IN_MEMORY = 20
RANK = 16
RETURNING = 100
TOKENS = [(7 * i) % 250 for i in range(32)]
DATUM = everstep.Datum(
    model_input=everstep.ModelInput.from_ints(TOKENS[:-1]),
    loss_fn_inputs={"target_tokens": TOKENS[1:]},
)


def step(run: everstep.TrainingClient) -> float:
    """Train one step and return its loss."""
    passed = run.forward_backward([DATUM], "cross_entropy")
    run.optim_step(everstep.AdamParams(learning_rate=0.01)).result()
    return passed.result().metrics["loss:sum"]


def used_mib(pid: int) -> float:
    """Return the memory of a process and its descendants in MiB. What they share counts once."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            total += int(line.split()[1])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return total / 1024 + sum(used_mib(int(child)) for child in children)


def main() -> None:
    """Run the benchmark."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        budget = IN_MEMORY * state_bytes(home / "measure")
        with client_of(home / "many", f"memory_bytes={budget}") as service:
            report(service, count, home / "many")


@contextmanager
def client_of(home: Path, *settings: str) -> Iterator[everstep.ServiceClient]:
    """Start a service on a home and yield a client of it."""
    with (
        serving(home, *settings) as served,
        everstep.ServiceClient(base_url=served.address) as service,
    ):
        yield service


def state_bytes(home: Path) -> int:
    """Return the memory of one run in bytes: its checkpoint and the buffer of gradients."""
    with client_of(home) as service:
        run = service.create_lora_training_client(MODEL, rank=RANK, seed=1).result()
        step(run)
        run.save_state("size").result()
        (saved,) = (
            everstep.RestClient(base_url=service.base_url)
            .list_checkpoints(run.model_id)
            .result()
            .checkpoints
        )
        return (saved.size_bytes or 0) * 4 // 3


def report(service: everstep.ServiceClient, count: int, home: Path) -> None:
    """Create the runs, return to some, and print the figures."""
    pid = int((home / "ledger.sqlite.lock").read_text())
    runs, sizes, begin = [], [], time.perf_counter()
    expected: list[float] = []
    for index in range(count):
        run = service.create_lora_training_client(MODEL, rank=RANK, seed=1).result()
        losses = [step(run)]
        if not expected:
            expected = [*losses, step(run)]
            continue
        assert losses == expected[:1]
        runs.append(run)
        if index % max(1, count // 100) == 0 or index == IN_MEMORY:
            sizes.append((index, used_mib(pid)))
    created = time.perf_counter() - begin
    begin = time.perf_counter()
    returning = random.Random(0).sample(runs, min(RETURNING, len(runs)))
    assert all(step(run) == expected[1] for run in returning), "a restored run differs"
    back = time.perf_counter() - begin
    few = next(size for index, size in sizes if index >= IN_MEMORY)
    print(f"{'runs':>6}  memory of service and worker")
    for index, size in sizes[:: max(1, len(sizes) // 10)]:
        print(f"{index:>6}  {size:8.0f} MiB")
    last = sizes[-1][1]
    print(f"after {IN_MEMORY}: {few:.0f} MiB; after {count}: {last:.0f}; ratio {last / few:.2f}")
    print(f"create and train a step: {1000 * created / count:.0f} ms a run")
    print(f"restore and train a step: {1000 * back / len(returning):.0f} ms; all exact")
    draw(sizes)


def draw(sizes: list[tuple[int, float]]) -> None:
    """Plot the memory over the number of runs to many_runs.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*sizes, strict=True))
    axes.set_xlabel("live runs")
    axes.set_ylabel("service and worker, MiB")
    axes.set_ylim(bottom=0)
    axes.set_title(f"live runs with memory for {IN_MEMORY}")
    figure.savefig("many_runs.png", dpi=120, bbox_inches="tight")
    print("plot: many_runs.png")


if __name__ == "__main__":
    main()
