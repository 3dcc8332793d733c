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
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import everstep
from everstep import types

READY = "everstep: ready at "
SERVE_WITHOUT = "serve-without"
PATIENCE_SECONDS = 300.0
PATIENCE = 8
"""How many times the seconds owed until a result is given up."""


class Service:
    """A service process that takes no snapshots while runs train.

    Args:
        home: its home directory.
        in_replay: whether it takes snapshots in the course of a replay.
    """

    def __init__(self, home: Path, *, in_replay: bool) -> None:
        self._log = home.with_suffix(".log")
        command = [sys.executable, "-m", "everstep.cli"]
        if not in_replay:
            command = [sys.executable, __file__, SERVE_WITHOUT]
        command += ["serve", "--home", str(home), "--port", "0", "--set", "replay_seconds=100000"]
        command += ["--set", "worker_attempts=1000"]  # the kills are no fault of an operation
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait_until(lambda: READY in self._log.read_text())
        self.url = self._log.read_text().partition(READY)[2].split()[0]

    def kill_worker(self) -> bool:
        """Kill the worker. Returns whether there was one."""
        pids = [self._process.pid]
        while pids:  # the service's children, and theirs
            pid = pids.pop()
            if b"everstep.worker.main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                return True
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return False

    def kill(self) -> None:
        """Kill the service. Its worker ends with it."""
        self._process.kill()
        self._process.wait()


def wait_until(found: object) -> None:
    """Poll every 10 ms until a function returns true."""
    assert callable(found)
    until = time.monotonic() + PATIENCE_SECONDS
    while not found():
        if time.monotonic() > until:
            raise TimeoutError(f"nothing happened within {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.01)


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
    """Measure one service. Returns a line of the table."""
    service = Service(home, in_replay=in_replay)
    try:
        client = everstep.ServiceClient(base_url=service.url)
        run = client.create_lora_training_client("everstep/pico", rank=16, seed=1).result()
        steps = train(run, owed)
        service.kill_worker()
        begin, kills = time.perf_counter(), 1
        pending = run.forward_backward(batch(steps), "cross_entropy")
        done = threading.Event()
        threading.Thread(target=lambda: (pending.result(), done.set()), daemon=True).start()
        while not done.wait(None if once else every):
            if time.perf_counter() - begin > PATIENCE * owed:
                return f"not within {PATIENCE * owed:.0f} s, {kills} kills"
            kills += service.kill_worker()
        return f"{time.perf_counter() - begin:.1f} s, {kills} kills"
    finally:
        service.kill()


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
    from everstep.runtime.execution.replay_snapshots import (
        ReplaySnapshots,
    )

    async def after(*_: object) -> None:
        """Take none."""

    ReplaySnapshots.after = after  # type: ignore[method-assign]
    del sys.argv[1]
    cli()


if __name__ == "__main__":
    serve_without() if SERVE_WITHOUT in sys.argv else main()
