"""How long does a first step take where no service runs yet?

    python benchmarks/cold_start.py [--quick]

A new process starts a service on a new home, creates a run of the built-in model and trains a step.
Compared, in turns, with a process that only imports from torch and transformers what a training
script does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, run

FIRST_STEP = """
import sys, everstep
service = everstep.ServiceClient(base_url="local", home=sys.argv[1])
run = service.create_lora_training_client("everstep/pico", rank=8, seed=1).result()
tokens = list(range(1, 65))
datum = everstep.Datum(
    model_input=everstep.ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": tokens}
)
passed = run.forward_backward([datum] * 4, "cross_entropy")
run.optim_step(everstep.AdamParams(learning_rate=1e-3)).result()
passed.result()
"""
PACKAGES = "import torch, transformers"
IMPORTS = PACKAGES + "; from transformers import AutoTokenizer, LlamaForCausalLM"
DONE = "\nprint('done', flush=True)"


def seconds(code: str, home: Path) -> float:
    """Return how long a new process takes until it has run some code."""
    environment = {name: value for name, value in os.environ.items() if name != "EVERSTEP_ZYGOTE"}
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code + DONE, str(home)], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        return time.perf_counter() - begin


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    found: dict[str, list[float]] = {FIRST_STEP: [], IMPORTS: [], PACKAGES: []}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        for number in range(3 if arguments.quick else 7):
            for code, taken in found.items():
                taken.append(seconds(code, Path(directory) / str(number)))
    step, imports, packages = (statistics.median(taken) for taken in found.values())
    yield Figure("cold start to the first step", step, "s", "imports of a script", imports, 1.2)
    yield Figure("the same", step, "s", "import torch, transformers", packages)


if __name__ == "__main__":
    run(__doc__, measure)
