"""Options that several commands have, and how they tell what went wrong."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path, typer.Option(envvar="EVERSTEP_HOME", help="Where everything is kept.", file_okay=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
DEFAULT_HOME = Path("~/.everstep")


class Refused(Exception):
    """A command can't do what it was asked; the text says why and what to do."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Print an error as one line on standard error, and exit with code 1."""
    from sqlalchemy.exc import SQLAlchemyError

    from everstep.ledger import LedgerError
    from everstep.runtime.errors import OperationFailed, Rejected
    from everstep.vault import VaultError

    try:
        yield
    except (
        Refused,
        VaultError,
        LedgerError,
        OperationFailed,
        Rejected,
        SQLAlchemyError,
        OSError,
    ) as error:
        print(f"everstep: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def existing_home(home: Path) -> Path:
    """The home's full path; raises `Refused` when it has no vault."""
    home = home.expanduser().resolve()
    if not (home / "vault").is_dir():
        raise Refused(f"There is no everstep home at {home}: it has no vault. Choose --home.")
    return home
