"""Options of ``everstep backup`` and ``everstep restore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.common.errors import report_errors
from everstep.cli.common.options import DEFAULT_HOME, Home, Json, existing_home

BackupDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Directory of the backups.", file_okay=False)
]


def backup(
    directory: BackupDir,
    home: Home = DEFAULT_HOME,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy files instead of sharing them by hard links.")
    ] = False,
    keep: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of backups to keep in DIR.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Back up a home and verify the backup.

    Works while the service of the home runs, and transfers only new files. Exits with 1 if
    something in the home is damaged. The backup then leaves it out and names it.
    """
    with report_errors():
        from everstep.cli.backup.create import create_backup

        target = directory.expanduser().resolve()
        ok = create_backup(existing_home(home), target, link=not copy, keep=keep, as_json=as_json)
    raise typer.Exit(0 if ok else 1)


def restore(
    directory: BackupDir,
    home: Home = DEFAULT_HOME,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Backup to restore. [default: the newest]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore a home from a backup.

    The home must be empty or absent.
    """
    with report_errors():
        from everstep.cli.backup.restore import restore_backup

        target = home.expanduser().resolve()
        restore_backup(directory.expanduser().resolve(), target, backup_id=at, as_json=as_json)
