"""``everstep checkpoint``: list and info; the other commands have modules of their own."""

from __future__ import annotations

import typer

from everstep.cli import filters
from everstep.cli.checkpoint_care import gc, verify
from everstep.cli.checkpoint_copy import copy, save_as
from everstep.cli.checkpoint_delete import delete
from everstep.cli.checkpoint_diff import diff
from everstep.cli.checkpoint_download import download
from everstep.cli.checkpoint_marks import publish, set_ttl, tag, unpublish
from everstep.cli.checkpoint_transfer import export, import_
from everstep.cli.completion import CheckpointPath
from everstep.cli.run import Limit
from everstep.cli.target import Target, with_target

app = typer.Typer(
    name="checkpoint",
    help="List, inspect, move and delete checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
    from everstep.cli import checkpoint_views, listing, output

    wanted = filters.Filters.of(run, kind, before, after, name)
    with target.service() as service:
        found = listing.checkpoints(service.rest, wanted)
    shown = found[: limit or None]
    if target.as_json:
        content = [each.model_dump(mode="json") for each in shown]
        output.print_json({"checkpoints": content, "total": len(found)})
    else:
        checkpoint_views.print_list(shown, len(found))


@app.command()
@with_target
def info(target: Target, path: CheckpointPath) -> None:
    """Say what a checkpoint is: what it was trained with, and where it comes from."""
    from everstep.cli import checkpoint_views, listing, output
    from everstep.client._errors import APIStatusError

    with target.service() as service:
        checkpoint = listing.one(service.rest, path)
        try:
            trained = service.rest.get_weights_info_by_tinker_path(path).result()
        except APIStatusError:
            trained = None  # the hosted service doesn't tell it of every kind
        details = service.details(path)
    if target.as_json:
        output.print_json(checkpoint_views.info_json(checkpoint, trained, details))
    else:
        checkpoint_views.print_info(checkpoint, trained, details)


_COMMANDS = (
    verify,
    diff,
    save_as,
    download,
    copy,
    publish,
    unpublish,
    set_ttl,
    tag,
    delete,
    gc,
    export,
)
for command in _COMMANDS:
    app.command()(command)
app.command("import")(import_)
