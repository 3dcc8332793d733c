"""Options of ``everstep conformance``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.common.options import seconds


def conformance(
    base_url: Annotated[
        str,
        typer.Option(metavar="URL", envvar="TINKER_BASE_URL", help="Address of the service."),
    ] = "http://127.0.0.1:8055",
    api_key: Annotated[
        str, typer.Option(metavar="KEY", envvar="TINKER_API_KEY", help="API key of the service.")
    ] = "tml-conformance",
    second_api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="API key of a second user, to check that users are kept apart."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Base model to train. [default: the first one listed]",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Check to run; may be repeated.")
    ] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="List the checks and exit.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the report as JUnit XML.")
    ] = None,
    timeout: Annotated[float, seconds("Time to wait for each result.", at_least=1)] = 120.0,
) -> None:
    """Check how a Tinker service keeps checkpoints.

    Uses HTTP alone. Exits with 1 if a promise does not hold, or could not be checked.
    """
    from everstep.cli.conformance.run import check_service, print_checks
    from everstep.conformance import Target

    if list_checks:
        print_checks()
        return
    target = Target(base_url, api_key, second_api_key, model, timeout)
    raise typer.Exit(check_service(target, only or [], json_file, junit_file))
