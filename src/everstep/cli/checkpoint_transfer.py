"""``everstep checkpoint export`` and ``import`` as they are typed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.completion import CheckpointPath
from everstep.cli.target import Target, with_target


class Format(StrEnum):
    """What a checkpoint is exported as."""

    PEFT = "peft"
    MERGED = "merged"


class Dtype(StrEnum):
    """Of the weights of a merged model."""

    BF16 = "bf16"
    FP32 = "fp32"


@with_target
def export(
    target: Target,
    path: CheckpointPath,
    directory: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)],
    form: Annotated[Format, typer.Option("--format", help="The adapter, or all.")] = Format.PEFT,
    dtype: Annotated[Dtype, typer.Option(help="Of a merged model.")] = Dtype.BF16,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="DIR_OR_HUB_ID", help="Where the base model is, if not on the hub."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Push DIR there; private if it is new.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public.")] = False,
) -> None:
    """Write a checkpoint for PEFT and vLLM, or merged into its base model. DIR appears whole."""
    from everstep.cli.checkpoint_export import Export
    from everstep.cli.checkpoint_export import export as command

    merged_as = str(dtype) if form is Format.MERGED else None
    wanted = Export(path, directory, merged_as, base_model, push_to_hub, public)
    command(target, wanted)


@with_target
def import_(
    target: Target,
    source: Annotated[Path, typer.Argument(metavar="DIR_OR_TAR", exists=True)],
    name: Annotated[str | None, typer.Option(help="Of the checkpoint; DIR_OR_TAR's own.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What it was trained on, as the service calls it."),
    ] = None,
) -> None:
    """Make a checkpoint of an adapter in PEFT's format, or of a downloaded archive."""
    from everstep.cli.checkpoint_import import import_ as command

    command(target, source, name, base_model)
