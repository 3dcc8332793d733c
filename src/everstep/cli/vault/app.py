"""Options of ``everstep vault``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from everstep.cli.common.errors import report_errors
from everstep.cli.common.groups import command_group
from everstep.cli.common.options import (
    DEFAULT_HOME,
    DryRun,
    Home,
    Json,
    VaultUrl,
    Yes,
    existing_home,
    seconds,
)
from everstep.cli.common.target import Target

app = command_group("vault", "Maintain the checkpoint files of a home.")


@app.command()
def verify(
    home: Home = DEFAULT_HOME,
    vault: VaultUrl = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Verify unreferenced files as well.")
    ] = False,
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Move damaged files into quarantine."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Verify the hash of every checkpoint file.

    Works while the service of the home runs, except with --quarantine. Exits with 1 if a file is
    damaged, and lists the affected runs and checkpoints.
    """
    with report_errors():
        from everstep.cli.vault.verify import verify_home

        ok = verify_home(existing_home(home, vault), everything, quarantine, as_json)
    raise typer.Exit(0 if ok else 1)


@app.command()
def quarantined(home: Home = DEFAULT_HOME, vault: VaultUrl = None, as_json: Json = False) -> None:
    """List the damaged files in quarantine."""
    with report_errors():
        from everstep.cli.vault.quarantine import print_quarantine

        print_quarantine(Target.of_home(home, vault, as_json))


@app.command()
def gc(
    home: Home = DEFAULT_HOME,
    vault: VaultUrl = None,
    grace: Annotated[float, seconds("Minimum age of what is removed.")] = 3600.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove expired checkpoints and unreferenced files."""
    with report_errors():
        from everstep.cli.vault.collect import collect

        collect(Target.of_home(home, vault, as_json), grace, dry_run)


@app.command()
def prune(
    run: Annotated[str, typer.Option(metavar="ID", help="Run of the checkpoints.")],
    keep_last: Annotated[
        int, typer.Option(min=0, metavar="N", help="Number of newest checkpoints to keep.")
    ] = 0,
    keep_best: Annotated[
        int, typer.Option(min=0, metavar="N", help="Number of best checkpoints to keep.")
    ] = 0,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Entry of user_metadata that ranks the checkpoints."),
    ] = None,
    mode: Annotated[
        Literal["min", "max"], typer.Option(help="Whether the smallest or largest metric is best.")
    ] = "min",
    ttl: Annotated[
        float | None, seconds("Age below which checkpoints are kept.", at_least=1)
    ] = None,
    home: Home = DEFAULT_HOME,
    vault: VaultUrl = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a run's checkpoints except the newest and the best.

    Training and sampler checkpoints are counted separately. The last intact checkpoint of each is
    never deleted.
    """
    with report_errors():
        from everstep.cli.vault.prune import prune_request, prune_run

        request = prune_request(run, keep_last, keep_best, metric, mode, ttl)
        prune_run(home, vault, request, dry_run=dry_run, yes=yes, as_json=as_json)


@app.command()
def rebuild(home: Home = DEFAULT_HOME, vault: VaultUrl = None, as_json: Json = False) -> None:
    """Rebuild a lost database from checkpoint manifests.

    Exits with 1 if a checkpoint is damaged. The database then lacks it.
    """
    with report_errors():
        from everstep.cli.vault.rebuild import rebuild_database

        ok = rebuild_database(home, vault, as_json)
    raise typer.Exit(0 if ok else 1)
