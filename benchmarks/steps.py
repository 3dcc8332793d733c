"""How many training steps a second does a service make of a tiny model, and what do they cost it?

    python benchmarks/steps.py [--quick]

A step is a pass over 4 sequences of 64 tokens and a step of the optimizer. The official client and
ours wait for each step, and send 60 steps at once. The peer is the engine alone, in a process
without a service, with the threads of a worker. All take turns in one run.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tinker
from figures import Figure, run
from serving import Served, serving

import everstep
from everstep.worker.zygote.fit import worker_environment

MODEL = "everstep/pico"
SEQUENCES, LENGTH, QUEUED = 4, 64, 60
ENGINE = """
import sys, time
from pathlib import Path
import numpy as np
from everstep.engine import AdamParams, AdapterConfig, forward_backward, load_model, optim_step
from everstep.engine.models.pico import write_pico
from everstep.wire.messages.passes import Example

directory, count = Path(sys.argv[1]), int(sys.argv[2])
write_pico(directory)
model = load_model("pico", str(directory), device="cpu")
state = model.new_run(AdapterConfig(rank=16, seed=1))
tokens = [np.arange(64) * 7 % 250 + i for i in range(4)]
ones = np.ones(63, np.float32)
examples = [Example(t[:-1], {"target_tokens": t[1:], "weights": ones}) for t in tokens]

def step():
    for _ in forward_backward(model, state, examples, "cross_entropy", {}, backward=True):
        pass
    optim_step(state, AdamParams(learning_rate=1e-4))

for _ in range(10):
    step()
begin = time.perf_counter()
for _ in range(count):
    step()
print(count / (time.perf_counter() - begin))
"""


def datums(sdk: Any) -> list[Any]:
    """Return the pass of a step."""
    tokens = [[7 * i % 250 + n for i in range(LENGTH)] for n in range(SEQUENCES)]
    return [
        sdk.Datum(
            model_input=sdk.ModelInput.from_ints(each[:-1]),
            loss_fn_inputs={"target_tokens": each[1:], "weights": [1.0] * (LENGTH - 1)},
        )
        for each in tokens
    ]


class Client:
    """A training run of one client.

    Args:
        sdk: the client's module.
        address: of the service.
    """

    def __init__(self, sdk: Any, address: str) -> None:
        self._adam = sdk.AdamParams(learning_rate=1e-4)
        self._data = datums(sdk)
        service = sdk.ServiceClient(base_url=address, api_key="tml-benchmark")
        self._run = service.create_lora_training_client(MODEL, rank=16, seed=1)
        if hasattr(self._run, "result"):
            self._run = self._run.result()

    def send(self) -> list[Any]:
        """Send a step and return its futures."""
        return [
            self._run.forward_backward(self._data, "cross_entropy"),
            self._run.optim_step(self._adam),
        ]

    def awaited(self, count: int) -> None:
        """Train, and wait for each step."""
        for _ in range(count):
            for future in self.send():
                future.result()

    def queued(self, count: int) -> None:
        """Send all steps, then wait for them."""
        sent = [future for _ in range(count) for future in self.send()]
        for future in sent:
            future.result()


def engine_rate(directory: Path, count: int) -> float:
    """Return the steps per second of the engine alone, in a process of its own."""
    command = [sys.executable, "-c", ENGINE, str(directory), str(count)]
    environment = worker_environment()
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(ended.stdout)


def rate(train: Callable[[int], None], count: int) -> float:
    """Return the steps per second of a client."""
    begin = time.perf_counter()
    train(count)
    return count / (time.perf_counter() - begin)


def rounds(served: Served, directory: Path, number: int, count: int) -> dict[str, list[float]]:
    """Measure everyone in turns."""
    clients = {"official client": Client(tinker, served.address)}
    clients["everstep client"] = Client(everstep, served.address)
    for client in clients.values():
        client.awaited(10)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(number):
        found["engine"].append(engine_rate(directory / "pico", count))
        for name, client in clients.items():
            service, own = served.cpu_seconds(), time.process_time()
            found[name].append(rate(client.awaited, count))
            found[f"{name}, service CPU"].append((served.cpu_seconds() - service) / count)
            found[f"{name}, own CPU"].append((time.process_time() - own) / count)
            found[f"{name}, queued"].append(rate(client.queued, QUEUED))
    return found


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    logging.getLogger("tinker").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with serving(directory / "home") as served:
            number, count = (2, 60) if arguments.quick else (5, 200)
            found = rounds(served, directory, number, count)
    median = {name: statistics.median(values) for name, values in found.items()}
    engine = median["engine"]
    peer = "engine alone, steps/s"
    aims = {"official client": 0.5, "everstep client": 0.6}  # with 150 steps/s: 75 and 90
    for name, aim in aims.items():
        yield Figure(f"{name}, steps awaited", median[name], "steps/s", peer, engine, aim)
        queued = median[f"{name}, queued"]
        yield Figure(f"{name}, {QUEUED} steps queued", queued, "steps/s", peer, engine, 0.7)
        for whose in ("service CPU", "own CPU"):
            cpu = median[f"{name}, {whose}"] * 1e3
            yield Figure(f"{name}, {whose} a step", cpu, "ms", "engine's ms", 1e3 / engine)


if __name__ == "__main__":
    run(__doc__, measure)
