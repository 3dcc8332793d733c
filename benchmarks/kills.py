"""How long does a run take to come back while its worker is killed every few seconds?

    python benchmarks/kills.py [--every SECONDS] [--owed SECONDS]

Trains a run until a restart would have to recompute some seconds (`--owed`), then submits one more
pass and kills the worker every few seconds (`--every`) until its result is there. A replay that
took no snapshots would begin anew after each kill. Measures a service that snapshots runs in the
course of their replay and one that does not, and one whose worker is killed once. Gives up after
eight times the time that was owed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import threading
import time
from pathlib import Path

from serving import EVERSTEP, serving

import everstep
from everstep import types

SETTINGS = (
    "replay_seconds=100000",  # no snapshots while runs train
    "worker_attempts=1000",  # the kills are no fault of an operation
)
SERVE_WITHOUT = "serve-without"
PATIENCE = 8
"""How many times the seconds owed until a result is given up."""


def batch(number: int) -> list[types.Datum]:
    """Return a pass that takes everstep/pico some hundredths of a second."""
    data = []
    for index in range(16):
        tokens = [(7 * i + 11 * index + number) % 250 for i in range(257)]
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 256},
            )
        )
    return data


def train(run: everstep.TrainingClient, seconds: float) -> int:
    """Train for some seconds. Returns the number of steps."""
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        passed = run.forward_backward(batch(steps), "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=0.001)).result()
        passed.result()
        steps += 1
    return steps


def measure(home: Path, every: float, owed: float, *, in_replay: bool, once: bool) -> str:
    """Measure a service, with or without snapshots in its replay. Returns a line of the table."""
    command = EVERSTEP if in_replay else (sys.executable, __file__, SERVE_WITHOUT)
    environment = {"OMP_NUM_THREADS": "1"}
    with serving(home, *SETTINGS, environment=environment, everstep=command) as served:
        client = everstep.ServiceClient(base_url=served.address)
        run = client.create_lora_training_client("everstep/pico", rank=16, seed=1).result()
        steps = train(run, owed)
        served.kill_worker()
        begin, kills = time.perf_counter(), 1
        pending = run.forward_backward(batch(steps), "cross_entropy")
        done = threading.Event()
        threading.Thread(target=lambda: (pending.result(), done.set()), daemon=True).start()
        while not done.wait(None if once else every):
            if time.perf_counter() - begin > PATIENCE * owed:
                return f"not within {PATIENCE * owed:.0f} s, {kills} kills"
            kills += served.kill_worker()
        return f"{time.perf_counter() - begin:.1f} s, {kills} kills"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=float, default=3.0, help="seconds between kills")
    parser.add_argument("--owed", type=float, default=8.0, help="seconds of training to replay")
    arguments = parser.parse_args()
    every, owed = arguments.every, arguments.owed
    logging.getLogger("everstep.client").setLevel(logging.ERROR)  # of services that were killed
    print(f"{owed:.0f} s of training to replay; the worker is killed every {every:.0f} s")
    with tempfile.TemporaryDirectory() as directory:
        for name, in_replay, once in (
            ("killed once", True, True),
            ("with snapshots in the replay", True, False),
            ("without", False, False),
        ):
            home = Path(directory) / name.replace(" ", "-")
            found = measure(home, every, owed, in_replay=in_replay, once=once)
            print(f"{name:<30}{found}", flush=True)


def serve_without() -> None:
    """Serve as before there were snapshots in the course of a replay."""
    from everstep.cli import main as cli
    from everstep.runtime.execution.replay_snapshots import ReplaySnapshots

    async def after(*_: object) -> None:
        """Take none."""

    ReplaySnapshots.after = after  # type: ignore[method-assign]
    del sys.argv[1]
    cli()


if __name__ == "__main__":
    serve_without() if SERVE_WITHOUT in sys.argv else main()
