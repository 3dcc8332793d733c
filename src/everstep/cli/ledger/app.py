"""Options of ``everstep ledger``."""

from __future__ import annotations

import typer

from everstep.cli.common.errors import report_errors
from everstep.cli.common.groups import command_group
from everstep.cli.common.options import DEFAULT_HOME, Home, Json, existing_home

app = command_group("ledger", "Check the ledger of a home.")


@app.command()
def verify(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Verify the checksum of every row.

    Works while the service of the home runs. Exits with 1 if a row is damaged, and prints it with
    advice.
    """
    with report_errors():
        from everstep.cli.ledger.verify import verify_ledger

        ok = verify_ledger(existing_home(home), as_json)
    raise typer.Exit(0 if ok else 1)
