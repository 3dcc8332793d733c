"""Options of commands that train on a user's file."""

from __future__ import annotations

from typing import Annotated

import typer

MAX_DROPPED = 0.1
MaxDropped = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        metavar="SHARE",
        help="Largest share of the examples that may be dropped as too long.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD",
        help="Field of rows and messages to ignore; can be given several times.",
        show_default=False,
    ),
]
