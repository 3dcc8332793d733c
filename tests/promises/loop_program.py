"""A training script as a user would write it. Tests kill and restart it.

    python -m tests.promises.loop_program URL RUN_NAME STEPS [PAUSE_AT]

It iterates over shuffled data, saves every second step, and prints one line per step. At PAUSE_AT
it waits to be killed. At the end it prints the path of its last checkpoint.
"""

from __future__ import annotations

import random
import sys

import everstep
from tests.scenario import MODEL, data

EXAMPLES = 7
BATCH = 2


def order(epoch: int, seed: int) -> list[int]:
    """Return the examples of an epoch, shuffled."""
    return random.Random(seed * 1000 + epoch).sample(range(EXAMPLES), EXAMPLES)


def main(url: str, run_name: str, steps: int, pause_at: int | None) -> None:
    """Train."""
    service = everstep.ServiceClient(base_url=url, api_key="tml-test")
    examples = data(everstep, EXAMPLES)
    resumed = everstep.resume_or_create(service, run_name, MODEL, rank=4, seed=3).result()
    client, state, report = resumed
    now = state
    print("from", state.step, report.path, flush=True)
    policy = everstep.CheckpointPolicy(
        every_steps=2, keep_last=2, keep_best=1, metric="loss", mode="min"
    )
    with everstep.Checkpointer(resumed, policy) as saves:
        step, epoch, position = state.step, state.epoch, state.position
        seed = state.user.get("seed", 11)
        loss = 0.0
        while step < steps:
            if position + BATCH > EXAMPLES:
                epoch, position = epoch + 1, 0
            batch = order(epoch, seed)[position : position + BATCH]
            passed = client.forward_backward([examples[i] for i in batch], "cross_entropy")
            client.optim_step(everstep.AdamParams(learning_rate=0.01, weight_decay=0.1)).result()
            loss = passed.result().metrics["loss:sum"]
            step, position = step + 1, position + BATCH
            print("step", step, batch, repr(loss), flush=True)
            now = everstep.LoopState(step, epoch, position, {"seed": seed})
            saves.step(now, {"loss": loss})
            if step == pause_at:
                saves.flush().result()
                print("paused", flush=True)
                sys.stdin.read()
        path = saves.finish(now, {"loss": loss}).result().path
    print("end", path, flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    pause = int(arguments[3]) if len(arguments) > 3 else None
    main(arguments[0], arguments[1], int(arguments[2]), pause)
