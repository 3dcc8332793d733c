"""``everstep vault``: verify, collect, prune, rebuild."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

import typer

from everstep.cli.errors import told
from everstep.cli.options import (
    DEFAULT_HOME,
    DryRun,
    Home,
    Json,
    VaultUrl,
    Yes,
    existing_home,
)

app = typer.Typer(
    name="vault",
    help="Look after the checkpoints of a home.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def verify(
    home: Home = DEFAULT_HOME,
    vault: VaultUrl = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also files that no checkpoint names.")
    ] = False,
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Move what is damaged out of the way, with a note."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every checkpoint and hash it. Changes nothing; works beside a running service.

    Exits with 1 when something is damaged, and says which runs and checkpoints that touches.
    """
    with told():
        from everstep.cli import vault_work

        ok = vault_work.verify(existing_home(home, vault), everything, quarantine, as_json)
    raise typer.Exit(0 if ok else 1)


@app.command()
def quarantined(home: Home = DEFAULT_HOME, vault: VaultUrl = None, as_json: Json = False) -> None:
    """List what was found damaged and moved out of the way."""
    with told():
        from everstep.cli import vault_work

        vault_work.quarantined(existing_home(home, vault), as_json)


@app.command()
def gc(
    home: Home = DEFAULT_HOME,
    vault: VaultUrl = None,
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="What is younger than that stays.")
    ] = 3600.0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Free the disk of expired checkpoints, and of files that no checkpoint names.

    Works beside a running service, which then does it itself.
    """
    with told():
        from everstep.cli import vault_work

        vault_work.collect(existing_home(home, vault), grace, dry_run, as_json)


@app.command()
def prune(
    run: Annotated[str, typer.Option(metavar="ID", help="Whose checkpoints.")],
    keep_last: Annotated[int, typer.Option(min=0, help="Keep the newest so many.")] = 0,
    keep_best: Annotated[int, typer.Option(min=0, help="Keep the best so many.")] = 0,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="The number in user_metadata to go by.")
    ] = None,
    mode: Annotated[
        Literal["min", "max"], typer.Option(help="Whether the smallest or the largest is best.")
    ] = "min",
    ttl: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Keep what is younger as well.")
    ] = None,
    home: Home = DEFAULT_HOME,
    vault: VaultUrl = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a run's checkpoints but the last and the best.

    Training and sampler checkpoints count apart; of each, one that verifies always stays. Works
    beside a running service, which then deletes them itself.
    """
    with told():
        from everstep.cli import vault_prune
        from everstep.cli.errors import WrongUsage
        from everstep.vault.retention import Policy

        try:
            age = timedelta(seconds=ttl) if ttl is not None else None
            policy = Policy(keep_last, keep_best, metric, mode, age)
        except ValueError as error:
            raise WrongUsage(str(error)) from error
        vault_prune.prune(existing_home(home, vault), run, policy, dry_run, yes, as_json)


@app.command()
def rebuild(home: Home = DEFAULT_HOME, vault: VaultUrl = None, as_json: Json = False) -> None:
    """Make the index of checkpoints anew from their manifests, when the database is lost.

    Exits with 1 when a checkpoint is damaged; that one is left out.
    """
    with told():
        from everstep.cli import vault_rebuild

        ok = vault_rebuild.rebuild(home, vault, as_json)
    raise typer.Exit(0 if ok else 1)
