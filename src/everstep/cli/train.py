"""``everstep train``: a whole supervised run, that can be stopped at any moment and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli import filters
from everstep.cli.target import Target, with_target


@with_target
def train(
    target: Target,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A .jsonl of prompt and completion or of messages, or a .txt.",
            dir_okay=False,
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="RUN", help="The run's name; none: the file's.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH", help="The base model; none: the only one that is served."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps, instead of epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Of Adam; none: what suits the model.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapter.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of an example at most.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of the adapter and of the order.")] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, metavar="STEPS", help="Steps from checkpoint to checkpoint.")
    ] = 50,
    keep_last: Annotated[
        int, typer.Option(min=1, metavar="N", help="Keep the newest so many checkpoints.")
    ] = 3,
    keep_best: Annotated[
        int, typer.Option(min=0, metavar="N", help="Keep those of the lowest losses as well.")
    ] = 0,
    ttl: Annotated[
        str | None,
        typer.Option(
            metavar="SPAN", help="Checkpoints of a run that is abandoned expire after that: 30d."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="For losses.jsonl and loss.png; none: ./RUN.",
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Fine-tune a model on a file of examples, with checkpoints.

    Ctrl-C, or SIGTERM, finishes the step, saves and ends; a second one ends at once. After that, or
    after a crash or SIGKILL of whatever part, --resume goes on where the newest checkpoint was
    saved, data position included: the result is the uninterrupted run's, bit for bit.
    """
    from everstep.cli.train_work import Plan, run

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
        seed=seed,
        save_every=save_every,
        keep_last=keep_last,
        keep_best=keep_best,
        ttl=None if ttl is None else filters.read_span(ttl),
        directory=output or Path(name or data.stem),
    )
    run(target, plan)
