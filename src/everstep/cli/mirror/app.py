"""Options of ``everstep mirror``."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli.common.options import seconds
from everstep.cli.common.target import Target, with_target


@with_target
def mirror(
    target: Target,
    source: Annotated[
        str, typer.Option("--from", metavar="URL", help="Address of the service with the run.")
    ],
    run: Annotated[str, typer.Option(metavar="ID", help="Run to mirror.")],
    from_api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="EVERSTEP_MIRROR_API_KEY",
            help="API key of the service with the run. [default: the same as for any service]",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Base model of the run, if this service names it differently."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep mirroring new checkpoints until Ctrl-C.")
    ] = False,
    every: Annotated[float, seconds("Polling interval with --follow.", at_least=0.1)] = 60.0,
) -> None:
    """Copy a run's checkpoints from another Tinker service.

    Every file is verified. Checkpoints that were deleted there stay here. Exits with 1 if a
    checkpoint could not be copied.
    """
    from everstep.cli.mirror.copy import Source, mirror_run

    wanted = Source(source, from_api_key, run, base_model)
    if not mirror_run(target, wanted, every if follow else None):
        raise typer.Exit(1)
