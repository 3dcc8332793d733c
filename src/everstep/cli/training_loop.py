"""The loop of supervised fine-tuning, as a script would write it, and its progress bar."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import TracebackType
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

_LINES_WITHOUT_TERMINAL = 10


class Data(Protocol):
    """What each step trains on; the batch of a step depends on its number alone."""

    def __getitem__(self, step: int) -> list[Datum]:
        """The batch of a step, counted from 0."""


class Batches:
    """What each step trains on: the datums in a shuffled order, again and again.

    The batch of a step depends on its number alone, so that a restored run goes on with the data
    that the interrupted one would have seen.

    Args:
        datums: all of them; at least one.
        size: datums of a batch; all of them where there are fewer.
        seed: of the order.
    """

    def __init__(self, datums: Sequence[Datum], size: int, seed: int) -> None:
        self._datums = list(datums)
        random.Random(seed).shuffle(self._datums)
        self.size = min(size, len(self._datums))

    def __getitem__(self, step: int) -> list[Datum]:
        """The batch of a step, counted from 0."""
        start = step * self.size
        return [self._datums[(start + i) % len(self._datums)] for i in range(self.size)]


class Epochs:
    """What each step trains on: all datums once an epoch, in an order of that epoch's own.

    The batch of a step depends on its number alone, as in `Batches`.

    Args:
        datums: all of them; at least one.
        size: datums of a batch; the last one of an epoch has what is left.
        seed: of the orders.

    Attributes:
        steps: of an epoch.
    """

    def __init__(self, datums: Sequence[Datum], size: int, seed: int) -> None:
        self._datums = datums
        self._size = size
        self._seed = seed
        self.steps = -(-len(datums) // size)

    def __getitem__(self, step: int) -> list[Datum]:
        """The batch of a step, counted from 0."""
        epoch, begin = self.place(step)
        order = random.Random(f"{self._seed} {epoch}").sample(
            range(len(self._datums)), len(self._datums)
        )
        return [self._datums[index] for index in order[begin : begin + self._size]]

    def place(self, step: int) -> tuple[int, int]:
        """Where a step begins: its epoch, and the position in that epoch's order."""
        epoch, batch = divmod(step, self.steps)
        return epoch, batch * self._size


def train(
    client: TrainingClient,
    batches: Data,
    steps: range,
    learning_rate: float,
    seen: Callable[[float], None],
    sent: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Make some steps of supervised fine-tuning.

    Args:
        client: the run.
        batches: what each step trains on.
        steps: their numbers, counted from 0.
        learning_rate: of Adam.
        seen: is told each step's loss.
        sent: is told each step's number, counted from 0, once its requests are under way.

    Returns:
        Mean loss per learnt token of each step, in nats, before its update.
    """
    losses = []
    for step in steps:
        batch = batches[step]
        learnt = sum(sum(datum.loss_fn_inputs["weights"].tolist()) for datum in batch)
        passed = client.forward_backward(batch, "cross_entropy")
        stepped = client.optim_step(AdamParams(learning_rate=learning_rate))
        sent(step)
        losses.append(passed.result().metrics["loss:sum"] / learnt)
        stepped.result()
        seen(losses[-1])
    return losses


class Meter:
    """A progress bar with the loss; some lines instead where there is no terminal.

    Args:
        console: where it is shown.
        label: what is done.
        steps: how many.
        done: how many of them were made before.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, loss: float) -> None:
        """One more step is done."""
        self._done += 1
        self._progress.update(self._task, completed=self._done, loss=f"{loss:.4f}")
        every = max(1, self._steps // _LINES_WITHOUT_TERMINAL)
        if not self._console.is_terminal and (self._done % every == 0 or self._done == 1):
            self._console.print(f"{self._label}: step {self._done}/{self._steps}, loss {loss:.4f}")
