"""The loop of supervised fine-tuning, as a script would write it, and its progress meter."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from everstep import AdamParams, Datum, TrainingClient

MAX_LINES_WITHOUT_TERMINAL = 10


class Data(Protocol):
    """Batches by step. The batch of a step depends on its number alone."""

    def __getitem__(self, step: int) -> list[Datum]:
        """Return the batch of a step, counted from 0."""


class Batches:
    """Batches of the datums in one shuffled order, repeated.

    The batch of a step depends on its number alone, so that a restored run continues with the
    batches that the interrupted one would have seen.

    Args:
        datums: the datums, at least one.
        size: number of datums in a batch. All of them if there are fewer.
        seed: seed of the order.
    """

    def __init__(self, datums: Sequence[Datum], size: int, seed: int) -> None:
        self._datums = list(datums)
        random.Random(seed).shuffle(self._datums)
        self.size = min(size, len(self._datums))

    def __getitem__(self, step: int) -> list[Datum]:
        """Return the batch of a step, counted from 0."""
        start = step * self.size
        return [self._datums[(start + i) % len(self._datums)] for i in range(self.size)]


class Epochs:
    """Batches of all datums once in each epoch, in an order of its own.

    The batch of a step depends on its number alone, as in `Batches`.

    Args:
        datums: the datums, at least one.
        size: number of datums in a batch. The last batch of an epoch has the remaining ones.
        seed: seed of the orders.

    Attributes:
        steps: number of steps of an epoch.
    """

    def __init__(self, datums: Sequence[Datum], size: int, seed: int) -> None:
        self._datums = datums
        self._size = size
        self._seed = seed
        self.steps = -(-len(datums) // size)

    def __getitem__(self, step: int) -> list[Datum]:
        """Return the batch of a step, counted from 0."""
        epoch, begin = self.position(step)
        order = random.Random(f"{self._seed} {epoch}").sample(
            range(len(self._datums)), len(self._datums)
        )
        return [self._datums[index] for index in order[begin : begin + self._size]]

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the position of its first datum in that epoch's order."""
        epoch, batch = divmod(step, self.steps)
        return epoch, batch * self._size


def train(
    client: TrainingClient,
    batches: Data,
    steps: range,
    learning_rate: float,
    on_loss: Callable[[float], None],
    on_sent: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Run steps of supervised fine-tuning.

    Args:
        client: the run.
        batches: the batch of each step.
        steps: numbers of the steps, counted from 0.
        learning_rate: learning rate of Adam.
        on_loss: called with the loss of each step.
        on_sent: called with the number of each step once its requests are sent.

    Returns:
        Mean loss per learnt token of each step, in nats, before its update.
    """
    losses = []
    for step in steps:
        batch = batches[step]
        learnt = sum(sum(datum.loss_fn_inputs["weights"].tolist()) for datum in batch)
        passed = client.forward_backward(batch, "cross_entropy")
        stepped = client.optim_step(AdamParams(learning_rate=learning_rate))
        on_sent(step)
        losses.append(passed.result().metrics["loss:sum"] / learnt)
        stepped.result()
        on_loss(losses[-1])
    return losses


class Meter:
    """A progress bar with the loss. A few lines instead if there is no terminal.

    Args:
        console: where to print.
        label: text before the bar.
        steps: number of steps in all.
        done: number of steps that are done already.
    """

    def __init__(self, console: Console, label: str, steps: int, done: int = 0) -> None:
        self._console = console
        self._label = label
        self._steps = steps
        self._done = done
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(label, total=steps, completed=done, loss="")

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, loss: float) -> None:
        """Advance by one step and show its loss."""
        self._done += 1
        self._progress.update(self._task, completed=self._done, loss=f"{loss:.4f}")
        every = max(1, self._steps // MAX_LINES_WITHOUT_TERMINAL)
        if not self._console.is_terminal and (self._done % every == 0 or self._done == 1):
            self._console.print(f"{self._label}: step {self._done}/{self._steps}, loss {loss:.4f}")
