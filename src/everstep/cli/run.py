"""``everstep run``: list, info."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from everstep.cli import filters
from everstep.cli.completion import RunId
from everstep.cli.target import Target, with_target

app = typer.Typer(
    name="run",
    help="Look at training runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Limit = Annotated[int, typer.Option(min=0, metavar="N", help="So many at most; 0: all.")]


@app.command("list")
@with_target
def list_(
    target: Target,
    before: filters.Before = None,
    after: filters.After = None,
    name: filters.Name = None,
    project: Annotated[str | None, typer.Option(metavar="ID", help="Of this project.")] = None,
    limit: Limit = 0,
) -> None:
    """List runs, the latest used first.

    --before and --after go by the last use, --name by the name that a training loop gave its run.
    """
    from everstep.cli import listing, output

    wanted = filters.Filters.of(before=before, after=after, name=name)
    with target.service() as service:
        found = listing.runs(service.rest, wanted, project)
    shown = found[: limit or None]
    if target.as_json:
        output.print_json(
            {"runs": [each.model_dump(mode="json") for each in shown], "total": len(found)}
        )
        return
    rows = [
        (
            output.time_text(each.last_request_time),
            each.base_model,
            "" if each.lora_rank is None else str(each.lora_rank),
            filters.run_name(each),
            "corrupted" if each.corrupted else "",
            each.training_run_id,
        )
        for each in shown
    ]
    output.print_listing(
        ("used (UTC)", "base model", "rank", "name", "state", "run"), rows, len(found), "run"
    )


@app.command()
@with_target
def info(
    target: Target,
    run_id: RunId,
) -> None:
    """Say what a run is, and list its checkpoints."""
    from everstep.cli import checkpoint_views, listing, output

    with target.service() as service:
        run = listing.run(service.rest, run_id)
        saved = listing.checkpoints(service.rest, filters.Filters(run=run_id))
    if target.as_json:
        content: dict[str, Any] = run.model_dump(mode="json")
        output.print_json(
            {**content, "checkpoints": [each.model_dump(mode="json") for each in saved]}
        )
        return
    output.print_facts(
        [
            ("run", run.training_run_id),
            ("name", filters.run_name(run) or None),
            ("base model", run.base_model),
            ("rank", None if run.lora_rank is None else str(run.lora_rank)),
            ("owner", run.model_owner),
            ("last used", f"{output.time_text(run.last_request_time)} UTC"),
            ("state", "corrupted: it takes no operations" if run.corrupted else None),
            *((f"· {k}", v) for k, v in output.own_metadata(run.user_metadata).items()),
        ]
    )
    output.console().print()
    checkpoint_views.print_list(saved, len(saved))
