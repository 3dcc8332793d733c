"""``everstep mirror`` as it is typed."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli.target import Target, with_target


@with_target
def mirror(
    target: Target,
    source: Annotated[
        str, typer.Option("--from", metavar="URL", help="The service that has the run.")
    ],
    run: Annotated[str, typer.Option(metavar="ID", help="The run's id there.")],
    from_api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="EVERSTEP_MIRROR_API_KEY",
            help="For that service; none: as for any other.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Its base model, if the service here calls it otherwise."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what is saved later, until Ctrl-C.")
    ] = False,
    every: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="With --follow: how often to look.")
    ] = 60.0,
) -> None:
    """Copy a run's checkpoints from another Tinker service, verified; what is here stays.

    Exits with 1 when one could not be copied.
    """
    from everstep.cli.mirror_work import Source
    from everstep.cli.mirror_work import mirror as work

    wanted = Source(source, from_api_key, run, base_model)
    if not work(target, wanted, every if follow else None):
        raise typer.Exit(1)
