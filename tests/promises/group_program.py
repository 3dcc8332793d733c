"""One process of a job of several, each with a run, that save as a group. Tests kill it.

    python -m tests.promises.group_program URL GROUP SIZE INDEX ATTEMPT STEPS [STEP POINT]

At a step and a point it kills itself: ``before`` its save, once the save is ``sent``, once it is
``durable``, or once all members are ``whole``.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import everstep
from tests.scenario import MODEL, connect, train


def die() -> None:
    """End as in a power cut."""
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """A training client whose process dies at a point of its save."""

    def __init__(self, client: everstep.TrainingClient, point: str) -> None:
        self._client = client
        self._point = point

    def save_state(self, *arguments: Any, **more: Any) -> Any:
        """Save, and die."""
        if self._point == "before":
            die()
        future = self._client.save_state(*arguments, **more)
        if self._point == "sent":
            self._client.optim_step(everstep.AdamParams(learning_rate=0.0)).result()
            die()  # a later operation was executed, so the save was accepted
        if self._point == "durable":
            future.result()
            die()
        return future


def main(url: str, name: str, size: int, index: int, attempt: str, steps: int, *end: str) -> None:
    """Train, and save after every step."""
    service = connect(everstep, url)
    group = everstep.CheckpointGroup(service, name, size, attempt, wait_seconds=20, keep_last=2)
    restored = group.restore_member(index).result()
    if restored is None:
        client = service.create_lora_training_client(MODEL, rank=4, seed=index).result()
        first = 0
    else:
        client, first = restored.clients[0], restored.states[0].step
    print("from", first, flush=True)
    for step in range(first, steps):
        for loss, _ in train(everstep, client, 1, shift=step + 7 * index):
            print("step", step + 1, repr(loss), flush=True)
        state = everstep.LoopState(step + 1)
        mortal: Any = client
        if end and int(end[0]) == step + 1:
            mortal = Mortal(client, end[1])
        group.save(index, mortal, state).result()
        print("whole", step + 1, flush=True)
        if mortal is not client:
            die()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        arguments[0],
        arguments[1],
        int(arguments[2]),
        int(arguments[3]),
        arguments[4],
        int(arguments[5]),
        *arguments[6:],
    )
