"""``everstep ledger``: verify."""

from __future__ import annotations

import asyncio
from pathlib import Path

import typer

from everstep.cli.errors import told
from everstep.cli.options import DEFAULT_HOME, Home, Json, existing_home

app = typer.Typer(
    name="ledger",
    help="Look after the ledger of a home.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _ledger() -> None:
    """Look after the ledger of a home."""


@app.command()
def verify(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Read every row and compare it with its seal. Works beside a running service.

    Exits with 1 when something is damaged, and says what, and what to do.
    """
    with told():
        damaged = asyncio.run(_damaged(existing_home(home)))
        _print(damaged, as_json)
    raise typer.Exit(1 if damaged else 0)


async def _damaged(home: Path) -> list[str]:
    from everstep.cli.vault_work import opened
    from everstep.ledger.copying import check_database

    await asyncio.to_thread(check_database, home / "ledger.sqlite")
    async with opened(home, read_only=True) as ledger:
        return await ledger.damaged()


def _print(damaged: list[str], as_json: bool) -> None:
    from everstep.cli import output

    if as_json:
        output.print_json({"ok": not damaged, "damaged": damaged})
        return
    for each in damaged:
        print(each)
    count = output.counted(len(damaged), "row")
    print(f"Damaged: {count}." if damaged else "Every row is what was written.")
