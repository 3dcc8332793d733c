"""Options of ``everstep run``."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli.common import filters
from everstep.cli.common.completion import RunId, RunIds
from everstep.cli.common.groups import command_group
from everstep.cli.common.options import DryRun, Limit, Yes
from everstep.cli.common.target import Target, with_target

app = command_group("run", "List, inspect and delete training runs.")


@app.command("list")
@with_target
def list_(
    target: Target,
    before: filters.Before = None,
    after: filters.After = None,
    name: filters.Name = None,
    project: Annotated[str | None, typer.Option(metavar="ID", help="Project of the runs.")] = None,
    limit: Limit = 0,
) -> None:
    """List training runs, the latest used first.

    --before and --after compare the time of the last use. --name matches the name that a training
    loop gave its run.
    """
    from everstep.cli.run.show import print_runs

    print_runs(target, filters.Filters.of(before=before, after=after, name=name), project, limit)


@app.command()
@with_target
def info(
    target: Target,
    run_id: RunId,
) -> None:
    """Show a training run and its checkpoints."""
    from everstep.cli.run.show import print_run

    print_run(target, run_id)


@app.command()
@with_target
def delete(
    target: Target,
    runs: RunIds,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Delete runs permanently, with all that they own.

    That is their checkpoints, operations and samplers. Lists them with their size and asks for a
    confirmation. A run whose client is alive is refused. Copies of checkpoints, and runs that
    began from one, stay.
    """
    from everstep.cli.run.delete import delete_runs

    delete_runs(target, runs, dry_run=dry_run, yes=yes)
