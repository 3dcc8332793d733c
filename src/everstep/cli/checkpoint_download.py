"""``everstep checkpoint download``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.completion import CheckpointPaths
from everstep.cli.target import Target, with_target


@with_target
def download(
    target: Target,
    paths: CheckpointPaths,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Each gets a directory in it.", file_okay=False
        ),
    ] = Path(),
    force: Annotated[
        bool, typer.Option("--force", help="Replace what was downloaded before.")
    ] = False,
) -> None:
    """Fetch checkpoints' files, into DIR/<run>_<kind>_<name> each.

    A download that is broken off goes on where it was, and is there when it is whole: sizes are
    checked, and hashes where the service tells them.
    """
    from everstep.cli.download_work import download as command

    command(target, paths, output, force)
