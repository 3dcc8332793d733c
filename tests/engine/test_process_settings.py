"""Settings of a worker's process that may change its speed, never its bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from everstep.worker.zygote.fit import worker_environment

_PROGRAM = """
import sys
import torch
from everstep.engine import AdamParams, AdapterConfig, load_model, optim_step
from tests.engine.helpers import backward, examples
torch.set_num_threads(2)
model = load_model("pico", sys.argv[1], device="cpu")
state = model.new_run(AdapterConfig(rank=32, seed=3))
losses = []
for step in range(3):
    result = backward(model, state, examples(step, (200, 190, 61, 60)))
    losses.append(result.metrics["loss:sum"])
    optim_step(state, AdamParams(learning_rate=0.01))
print(torch.get_num_threads(), losses, state.adapter_hash())
"""


def start(directory: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_waiting_threads_and_kept_memory_change_no_bit(pico: Path) -> None:
    plain = dict(os.environ)
    for name in worker_environment().keys() - {"OPENBLAS_NUM_THREADS"}:
        if name.startswith(("OMP_", "GOMP_", "MALLOC_")):
            plain.pop(name, None)
    environments = [worker_environment(), {**plain, "GOMP_SPINCOUNT": "2000"}]
    assert environments[0]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "MALLOC_TRIM_THRESHOLD_" in environments[0]
    processes = [start(pico, environment) for environment in environments]
    first, second = (process.communicate()[0] for process in processes)
    assert first.startswith("2 [")
    assert first == second
