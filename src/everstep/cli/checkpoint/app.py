"""Options of ``everstep checkpoint``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.common import filters
from everstep.cli.common.completion import (
    CheckpointPath,
    CheckpointPaths,
    OptionalCheckpointPaths,
    checkpoint_paths,
)
from everstep.cli.common.errors import WrongUsage
from everstep.cli.common.filters import Filters
from everstep.cli.common.groups import command_group
from everstep.cli.common.options import DryRun, Limit, Yes
from everstep.cli.common.target import Target, with_target

app = command_group("checkpoint", "List, inspect, move and delete checkpoints.")
Ttl = Annotated[
    str | None,
    typer.Option("--ttl", metavar="SPAN", help="Time until the checkpoint expires, as 7d."),
]


class Format(StrEnum):
    """Format of an export."""

    PEFT = "peft"
    MERGED = "merged"


class Dtype(StrEnum):
    """Dtype of a merged model's weights."""

    BF16 = "bf16"
    FP32 = "fp32"


@app.command("list")
@with_target
def list_(
    target: Target,
    run: filters.Run = None,
    kind: filters.Kind = None,
    before: filters.Before = None,
    after: filters.After = None,
    name: filters.Name = None,
    limit: Limit = 0,
) -> None:
    """List checkpoints, newest first."""
    from everstep.cli.checkpoint.show import print_checkpoints

    print_checkpoints(target, Filters.of(run, kind, before, after, name), limit)


@app.command()
@with_target
def info(target: Target, path: CheckpointPath) -> None:
    """Show a checkpoint's details."""
    from everstep.cli.checkpoint.show import print_checkpoint

    print_checkpoint(target, path)


@app.command()
@with_target
def verify(
    target: Target,
    paths: OptionalCheckpointPaths = None,
    run: filters.Run = None,
    kind: filters.Kind = None,
    before: filters.Before = None,
    after: filters.After = None,
    name: filters.Name = None,
) -> None:
    """Verify checkpoints, by path or by filter.

    Without a path or a filter, all checkpoints are verified.
    Everstep hashes every file where it is stored. Other services have no hashes: a checkpoint is
    downloaded and its tensors are read. Exits with 1 if something is damaged.
    """
    from everstep.cli.checkpoint.verify import verify_checkpoints

    wanted = Filters.of(run, kind, before, after, name)
    if paths and wanted.given:
        raise WrongUsage("give paths, or filters.")
    verify_checkpoints(target, paths or [], wanted)


@app.command()
@with_target
def diff(
    target: Target,
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="Checkpoint path (tinker://…), or a directory.",
            autocompletion=checkpoint_paths,
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            help="Checkpoint path (tinker://…), or a directory.",
            autocompletion=checkpoint_paths,
        ),
    ],
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="Maximum number of tensors; 0 shows all.")
    ] = 20,
) -> None:
    """Compare the adapters of two checkpoints, tensor by tensor.

    Shows step, configuration and lineage side by side. A directory holds
    adapter_model.safetensors and adapter_config.json, as a download does. Exits with 1 if a tensor
    differs.
    """
    from everstep.cli.checkpoint.diff import print_diff

    print_diff(target, a, b, limit)


@app.command()
@with_target
def save_as(
    target: Target,
    path: CheckpointPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new checkpoint.")],
    ttl: Ttl = None,
) -> None:
    """Copy a checkpoint under another name, into a run of its own.

    Everstep copies the complete checkpoint. Other services load it and save it again, with the
    optimizer state if it has one.
    """
    from everstep.cli.checkpoint.copy import save_checkpoint_as

    save_checkpoint_as(target, path, name, None if ttl is None else filters.read_span(ttl))


@app.command()
@with_target
def download(
    target: Target,
    paths: CheckpointPaths,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Parent of the directories, one for each checkpoint.",
            file_okay=False,
        ),
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace existing directories.")] = False,
) -> None:
    """Download the files of checkpoints into DIR/<run>_<kind>_<name>.

    An interrupted download resumes. The directory appears when all files are complete: sizes are
    checked, and hashes if the service has them.
    """
    from everstep.cli.checkpoint.download import download_checkpoints

    download_checkpoints(target, paths, output, force)


@app.command()
@with_target
def copy(
    target: Target,
    path: CheckpointPath,
    project: Annotated[
        str,
        typer.Option(metavar="ID", envvar="TINKER_PROJECT_ID", help="Project to copy into."),
    ],
    ttl: Ttl = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="Weights access token, for a checkpoint of another account."
        ),
    ] = None,
) -> None:
    """Copy a checkpoint into a project, as a run of its own.

    The copy shares the files.
    """
    from everstep.cli.checkpoint.copy import copy_checkpoint

    seconds = None if ttl is None else filters.read_span(ttl)
    copy_checkpoint(target, path, project, seconds, token)


@app.command()
@with_target
def publish(target: Target, paths: CheckpointPaths) -> None:
    """Make checkpoints readable by everyone."""
    from everstep.cli.checkpoint.metadata import set_published

    set_published(target, paths, True)


@app.command()
@with_target
def unpublish(target: Target, paths: CheckpointPaths) -> None:
    """Make checkpoints readable only by their owner."""
    from everstep.cli.checkpoint.metadata import set_published

    set_published(target, paths, False)


@app.command()
@with_target
def set_ttl(
    target: Target,
    paths: CheckpointPaths,
    ttl: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="Time until they expire: 7d, 12h, or seconds."),
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="Clear the expiry.")] = False,
) -> None:
    """Set or clear checkpoints' expiry."""
    from everstep.cli.checkpoint.metadata import set_expiry

    if (ttl is None) != never:
        raise WrongUsage("give --ttl SPAN, or --never.")
    set_expiry(target, paths, ttl)


@app.command()
@with_target
def tag(
    target: Target,
    path: CheckpointPath,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Entries to set.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Entry to remove; may be repeated.")
    ] = None,
) -> None:
    """Change the user_metadata of a checkpoint."""
    from everstep.cli.checkpoint.metadata import change_tags

    pairs = dict(filters.read_pair(each) for each in tags or [])
    if not pairs and not remove:
        raise WrongUsage("give KEY=VALUE, or --remove KEY.")
    change_tags(target, path, pairs, remove or [])


@app.command()
@with_target
def delete(
    target: Target,
    paths: OptionalCheckpointPaths = None,
    run: filters.Run = None,
    kind: filters.Kind = None,
    before: filters.Before = None,
    after: filters.After = None,
    name: filters.Name = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Delete checkpoints permanently, by path or by filter.

    Lists them with their size and asks for a confirmation.
    """
    from everstep.cli.checkpoint.delete import delete_checkpoints

    wanted = Filters.of(run, kind, before, after, name)
    if bool(paths) == wanted.given:
        raise WrongUsage("give paths, or filters: --run, --kind, --before, --after, --name.")
    delete_checkpoints(target, paths or [], wanted, dry_run=dry_run, yes=yes)


@app.command()
@with_target
def gc(
    target: Target,
    grace: Annotated[
        str, typer.Option(metavar="SPAN", help="Minimum age of what is removed.")
    ] = "1h",
    dry_run: DryRun = False,
) -> None:
    """Remove expired checkpoints and unreferenced files.

    The service also does this regularly by itself.
    """
    from everstep.cli.vault.collect import collect

    collect(target, filters.read_span(grace), dry_run)


@app.command()
@with_target
def export(
    target: Target,
    path: CheckpointPath,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory to create.", file_okay=False)
    ],
    form: Annotated[
        Format, typer.Option("--format", help="The adapter alone, or merged into its base model.")
    ] = Format.PEFT,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of a merged model.")] = Dtype.BF16,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_HUB_ID",
            help="Base model to merge into. [default: the one that was trained]",
            show_default=False,
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Hugging Face repository to push to; private if it is new."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Export a checkpoint for PEFT, vLLM or transformers.

    Writes the adapter alone, or merged into its base model. DIR appears when the export is
    complete.
    """
    from everstep.cli.checkpoint.export import Export, export_checkpoint

    merged_as = str(dtype) if form is Format.MERGED else None
    wanted = Export(path, directory, merged_as, base_model, push_to_hub, public)
    export_checkpoint(target, wanted)


@app.command("import")
@with_target
def import_(
    target: Target,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR_OR_TAR", help="Adapter directory, or a downloaded archive.", exists=True
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the checkpoint. [default: the name of DIR_OR_TAR]",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Base model of the adapter, as the service names it. [default: as the adapter "
            "names it]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Import an adapter in PEFT's format, or a downloaded archive."""
    from everstep.cli.checkpoint.import_ import import_adapter

    import_adapter(target, source, name, base_model)
