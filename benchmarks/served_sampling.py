"""How many tokens a second do clients sample through a service?

    python benchmarks/served_sampling.py [--quick]

Requests for 1 and for 32 samples of up to 128 tokens of the built-in model, one after another, of
the official client and of ours. All draw the same tokens. The peer is the engine alone, in a
process without a service, with the threads of a worker. All take turns in one run.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tinker
from figures import Figure, run
from serving import serving

import everstep
from everstep.worker.zygote.fit import worker_environment

MODEL = "everstep/pico"
PROMPT, TOKENS = 32, 128
AIMS = {1: 0.5, 32: 0.8}
ENGINE = f"""
import sys, time
from pathlib import Path
import numpy as np
from everstep.engine import SampleSpec, SamplingBatch, load_model
from everstep.engine.models.pico import write_pico

directory, samples, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
write_pico(directory)
batch = SamplingBatch(load_model("pico", str(directory), device="cpu"))

def sample(seed):
    spec = SampleSpec(np.arange({PROMPT}), samples, max_tokens={TOKENS}, seed=seed)
    batch.add("it", spec, None)
    while batch.busy:
        finished = batch.step()
    return sum(len(each.tokens) for each in finished[0][1].sequences)

sample(0)
begin = time.perf_counter()
tokens = sum(sample(seed) for seed in range(count))
print(tokens / (time.perf_counter() - begin))
"""


class Client:
    """A sampler of one client.

    Args:
        sdk: the client's module.
        address: of the service.
    """

    def __init__(self, sdk: Any, address: str) -> None:
        service = sdk.ServiceClient(base_url=address, api_key="tml-benchmark")
        self._sampler = service.create_sampling_client(base_model=MODEL)
        if hasattr(self._sampler, "result"):
            self._sampler = self._sampler.result()
        self._prompt = sdk.ModelInput.from_ints(list(range(PROMPT)))
        self._sdk = sdk

    def rate(self, samples: int, count: int) -> float:
        """Sample one request after another. Returns tokens per second."""
        tokens, begin = 0, time.perf_counter()
        for seed in range(count):
            params = self._sdk.SamplingParams(max_tokens=TOKENS, seed=seed)
            found = self._sampler.sample(self._prompt, samples, params).result()
            tokens += sum(len(each.tokens) for each in found.sequences)
        return tokens / (time.perf_counter() - begin)


def engine_rate(directory: Path, samples: int, count: int) -> float:
    """Return the tokens per second of the engine alone, in a process of its own."""
    command = [sys.executable, "-c", ENGINE, str(directory), str(samples), str(count)]
    environment = worker_environment()
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(ended.stdout)


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    logging.getLogger("tinker").setLevel(logging.ERROR)
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, serving(Path(name) / "home") as served:
        clients = {sdk.__name__: Client(sdk, served.address) for sdk in (tinker, everstep)}
        number, count = (2, 10) if arguments.quick else (5, 40)
        for samples in AIMS:
            for client in clients.values():
                client.rate(samples, 2)
            for _ in range(number):
                alone = engine_rate(Path(name) / "pico", samples, count)
                found["engine", samples].append(alone)
                for who, client in clients.items():
                    found[who, samples].append(client.rate(samples, count))
    for samples, aim in AIMS.items():
        engine = statistics.median(found["engine", samples])
        for who in clients:
            rate = statistics.median(found[who, samples])
            what = f"{who}, {samples} sample{'s' * (samples > 1)} a request"
            yield Figure(what, rate, "tokens/s", "engine alone", engine, aim)


if __name__ == "__main__":
    run(__doc__, measure)
