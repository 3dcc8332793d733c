"""Options of ``everstep sample``."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli.common.completion import checkpoint_paths
from everstep.cli.common.options import finite
from everstep.cli.common.target import Target, with_target
from everstep.engine.config import MAX_SEED, MIN_SEED


@with_target
def sample(
    target: Target,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="Text to continue; '-' reads standard input."),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="PATH_OR_MODEL",
            help="Checkpoint (tinker://…) or base model to sample from. [default: the only base "
            "model that is served]",
            show_default=False,
            autocompletion=checkpoint_paths,
        ),
    ] = None,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "-n", min=1, metavar="N", help="Number of samples.")
    ] = 1,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of tokens of a sample.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, metavar="X", help="Sampling temperature; 0 is greedy.", callback=finite
        ),
    ] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="X",
            help="Probability mass of the tokens to choose from.",
            callback=finite,
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            min=-1, metavar="N", help="Number of likeliest tokens to choose from; -1 allows all."
        ),
    ] = -1,
    seed: Annotated[
        int | None,
        typer.Option(
            min=MIN_SEED, max=MAX_SEED, metavar="N", help="Seed; the same seed gives the same text."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text that ends a sample; may be repeated."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Format the prompt as a user's turn of a chat.")
    ] = False,
) -> None:
    """Generate text from a base model or a checkpoint.

    Several samples are separated by numbered lines.
    """
    from everstep.cli.sample.generate import Request, generate

    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
    }
    generate(target, Request(prompt, source, num_samples, chat, sampling))
