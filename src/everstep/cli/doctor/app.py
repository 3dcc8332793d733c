"""Options of ``everstep doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli.common.errors import Code, report_errors
from everstep.cli.common.options import DEFAULT_HOME, Home, Json
from everstep.cli.common.target import ApiKey

BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="TINKER_BASE_URL",
        help="Address of the service. [default: the service that runs on --home]",
        show_default=False,
    ),
]


def doctor(
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    home: Home = DEFAULT_HOME,
    as_json: Json = False,
) -> None:
    """Check this machine, the home and the service.

    Prints the findings with advice, and changes nothing. Exits with 1 if there is a problem.
    Warnings don't count.
    """
    with report_errors():
        from everstep.cli.doctor.run import run

        ok = run(base_url, api_key, home.expanduser().resolve(), as_json)
    raise typer.Exit(Code.DONE if ok else Code.FAILED)
