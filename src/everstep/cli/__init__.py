"""The ``everstep`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everstep.cli.options import DEFAULT_HOME, Home
from everstep.cli.vault import app as vault_app

app = typer.Typer(
    name="everstep",
    help="Fine-tuning over the Tinker protocol that never loses a step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(vault_app)


@app.callback()
def _everstep() -> None:
    """Fine-tuning over the Tinker protocol that never loses a step."""


@app.command()
def serve(
    home: Home = DEFAULT_HOME,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8055,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH_OR_HUB_ID", help="A model to serve; may be repeated."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting, as in replay_seconds=10 (docs/guides/operations.md); may be repeated.",
        ),
    ] = None,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run the service in the foreground. A second start on the same home goes on with it."""
    from everstep.cli.serve import serve as command

    command(home, host, port, model or [], setting or [], until_stdin_closes)


@app.command()
def quickstart(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .txt, or a .jsonl of prompt and completion or of messages; "
            "none: docstrings of Python's standard library.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME_OR_PATH", help="A model of the hub, or a directory.")
    ] = "everstep/pico",
    steps: Annotated[int, typer.Option(min=1, help="Training steps before the checkpoint.")] = 150,
    home: Home = DEFAULT_HOME,
) -> None:
    """Train on real text, save, restore into new clients, and compare bit for bit."""
    from everstep.cli.quickstart import quickstart as command

    command(data, model, steps, home)


def main() -> None:
    """Entry point of the command."""
    app()
