"""What do many runs at once cost? Their steps per second together, against one run's.

    python benchmarks/round_robin.py [--quick]

Each run has a client thread of its own that keeps two steps in flight, of 4 sequences of 64 tokens
on the tiny model. 1, 8 and 64 runs take turns in one run of the benchmark.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import Figure, run
from serving import serving
from steps import MODEL, datums

import everstep

RUNS = (1, 8, 64)
IN_FLIGHT = 2


def train(client: everstep.TrainingClient, steps: int) -> None:
    """Train some steps."""
    data, adam = datums(everstep), everstep.AdamParams(learning_rate=1e-4)
    sent: deque[Any] = deque()
    for _ in range(steps):
        client.forward_backward(data, "cross_entropy")
        sent.append(client.optim_step(adam))
        if len(sent) == IN_FLIGHT:
            sent.popleft().result()
    for future in sent:
        future.result()


def rate(clients: list[everstep.TrainingClient], steps: int) -> float:
    """Return the steps per second of some runs together, which share the steps."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(lambda client: train(client, steps // len(clients)), clients))
    return steps / (time.perf_counter() - begin)


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    rounds, steps = (2, 128) if arguments.quick else (5, 640)
    found: defaultdict[int, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, serving(Path(name) / "home") as served:
        service = everstep.ServiceClient(base_url=served.address)
        made = [
            service.create_lora_training_client(MODEL, rank=16, seed=1) for _ in range(RUNS[-1])
        ]
        clients = [each.result() for each in made]
        for client in clients:
            train(client, 1)
        for _ in range(rounds):
            for count in RUNS:
                found[count].append(rate(clients[:count], steps))
    median = {count: statistics.median(rates) for count, rates in found.items()}
    for count in RUNS[1:]:
        what = f"{count} runs in turns, together"
        yield Figure(what, median[count], "steps/s", "one run, steps/s", median[1], 1.0)


if __name__ == "__main__":
    run(__doc__, measure)
