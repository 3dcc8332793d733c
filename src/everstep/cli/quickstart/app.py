"""Options of ``everstep quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.common.options import DEFAULT_HOME, Home
from everstep.cli.train.options import MAX_DROPPED, Ignore, MaxDropped


def quickstart(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Training data, as of 'everstep train'. [default: docstrings of Python's standard "
            "library]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(metavar="NAME_OR_PATH", help="Base model: a hub id, or a local directory."),
    ] = "everstep/pico",
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Training steps before the checkpoint.")
    ] = 150,
    max_dropped: MaxDropped = MAX_DROPPED,
    ignore: Ignore = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Train, save, restore, and compare the runs bit for bit."""
    from everstep.cli.quickstart.run import Request, run_quickstart

    run_quickstart(Request(data, model, steps, max_dropped, tuple(ignore or ())), home)
