"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.errors import NotFound

Home = Annotated[
    Path, typer.Option(envvar="EVERSTEP_HOME", help="Where everything is kept.", file_okay=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
VaultUrl = Annotated[
    str | None,
    typer.Option(
        "--vault",
        metavar="URL",
        help="The bucket with the home's vault: s3://BUCKET/PREFIX, gs://…, az://…; remembered.",
    ),
]
DEFAULT_HOME = Path("~/.everstep")


def existing_home(home: Path, vault: str | None = None) -> Path:
    """The home's full path; raises `NotFound` when it has no vault.

    With ``vault``, `VaultElsewhere` when that is not where its vault lies.
    """
    home = home.expanduser().resolve()
    if not (home / "vault").is_dir():
        raise NotFound(f"There is no everstep home at {home}: it has no vault. Choose --home.")
    if vault is not None:
        from everstep.vault.location import check

        check(home, vault)
    return home
