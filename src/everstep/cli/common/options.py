"""Options that several commands share, and the checks of homes that belong to them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from everstep.cli.common.errors import NotFound, Refused
from everstep.integers import MAX_SECONDS


def _expanded(path: Path) -> Path:
    """Replace ``~``, which the environment may not define."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(
            f"{path} can't be found: HOME is not set, and this user has no home directory. Give "
            "a directory with --home or EVERSTEP_HOME."
        ) from error


def finite(number: float | None) -> float | None:
    """Check a number, as a callback of its option: ``nan`` and ``inf`` pass minimum and maximum."""
    if number is not None and not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number.")
    return number


def seconds(text: str, *, at_least: float = 0) -> Any:
    """Declare an option that takes a number of seconds, for ``Annotated[float, …]``.

    Args:
        text: its help.
        at_least: the minimum.
    """
    return typer.Option(
        min=at_least, max=MAX_SECONDS, metavar="SECONDS", help=text, callback=finite
    )


Home = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        envvar="EVERSTEP_HOME",
        help="Home directory of the service.",
        file_okay=False,
        callback=_expanded,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the changes without making them.")]
VaultUrl = Annotated[
    str | None,
    typer.Option(
        "--vault",
        metavar="URL",
        help="Bucket of the home's vault: s3://BUCKET/PREFIX, gs://… or az://…. The home "
        "remembers it.",
    ),
]
Limit = Annotated[
    int, typer.Option(min=0, metavar="N", help="Maximum number of rows; 0 shows all.")
]
DEFAULT_HOME = Path("~/.everstep")


def existing_home(home: Path, vault: str | None = None) -> Path:
    """Return the full path of a home.

    Args:
        home: the home.
        vault: URL of the bucket in which its vault is expected.

    Raises:
        NotFound: the home has no vault.
        VaultElsewhere: the vault is not in that bucket.
    """
    home = home.expanduser().resolve()
    if not (home / "vault").is_dir():
        raise NotFound(f"There is no everstep home at {home}: it has no vault. Choose --home.")
    if vault is not None:
        from everstep.vault.open import check

        check(home, vault)
    return home


def existing_ledger(home: Path) -> Path:
    """Return the path of a home's ledger. Raises `Refused` if there is none."""
    path = home / "ledger.sqlite"
    if not path.exists():
        raise Refused(
            f"{home} has a vault, but no {path.name}. If it was lost, restore it from a backup "
            "('everstep restore'), or rebuild it with 'everstep vault rebuild'."
        )
    return path
