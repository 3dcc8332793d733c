"""Options of ``everstep train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.common import filters
from everstep.cli.common.options import finite
from everstep.cli.common.target import Target, with_target
from everstep.cli.train.options import MAX_DROPPED, Ignore, MaxDropped
from everstep.engine.config import MAX_SEED


@with_target
def train(
    target: Target,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Training data: a .txt file, or a .jsonl file with messages, with prompt and "
            "completion, with conversations (ShareGPT) or with text.",
            dir_okay=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Name of the run. [default: that of DATA]", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="Base model. [default: the only one that is served]",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest checkpoint, if there is one.")
    ] = False,
    epochs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of passes over the data.")
    ] = 1,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of optimizer steps, instead of --epochs."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of examples in a step.")
    ] = 16,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            metavar="X",
            help="Learning rate of Adam. [default: depends on the model]",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, metavar="N", help="LoRA rank.")] = 32,
    max_length: Annotated[
        int, typer.Option(min=2, metavar="N", help="Maximum number of tokens of an example.")
    ] = 1024,
    max_dropped: MaxDropped = MAX_DROPPED,
    ignore: Ignore = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_SEED,
            metavar="N",
            help="Seed for the adapter's initialisation and the data order.",
        ),
    ] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, metavar="STEPS", help="Interval between checkpoints.")
    ] = 50,
    keep_last: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of newest checkpoints to keep.")
    ] = 3,
    keep_best: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Number of checkpoints with the lowest loss to keep."
        ),
    ] = 0,
    ttl: Annotated[
        str | None,
        typer.Option(
            metavar="SPAN", help="Time until checkpoints of an abandoned run expire, as 30d."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory of losses.jsonl and loss.png. [default: ./RUN]",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Fine-tune a model on a file of examples.

    Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops. A second signal stops at
    once. After that, or after a crash of this command or of its service, --resume continues from
    the newest checkpoint. The result equals that of an uninterrupted run, bit for bit.
    """
    from everstep.cli.train.run import Plan, run

    plan = Plan(
        data=data,
        name=name or data.stem,
        model=model,
        resume=resume,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rank=rank,
        max_length=max_length,
        max_dropped=max_dropped,
        ignore=tuple(ignore or ()),
        seed=seed,
        save_every=save_every,
        keep_last=keep_last,
        keep_best=keep_best,
        ttl=None if ttl is None else filters.read_span(ttl),
        directory=output or Path(name or data.stem),
    )
    run(target, plan)
