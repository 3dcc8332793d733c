"""The ``everstep`` command."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from everstep.cli import completion
from everstep.cli.checkpoint import app as checkpoint_app
from everstep.cli.doctor import doctor
from everstep.cli.errors import told
from everstep.cli.ledger import app as ledger_app
from everstep.cli.mirror import mirror
from everstep.cli.options import DEFAULT_HOME, Home, Json, VaultUrl, existing_home
from everstep.cli.run import app as run_app
from everstep.cli.sample import sample
from everstep.cli.session import app as session_app
from everstep.cli.train import train
from everstep.cli.vault import app as vault_app

app = typer.Typer(
    name="everstep",
    help="Fine-tuning over the Tinker protocol that never loses a step.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (run_app, checkpoint_app, session_app, vault_app, ledger_app):
    app.add_typer(group)
for command in (train, sample, mirror, doctor):
    app.command()(command)


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
    vault: VaultUrl = None,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run the service in the foreground. A second start on the same home goes on with it."""
    from everstep.cli.serve import serve as command

    command(home, host, port, model or [], setting or [], vault, until_stdin_closes)


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


@app.command()
def backup(
    directory: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)],
    home: Home = DEFAULT_HOME,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy files that could be shared by hard links.")
    ] = False,
    keep: Annotated[int, typer.Option(min=1, help="How many backups DIR holds at most.")] = 1,
    as_json: Json = False,
) -> None:
    """Back a home up into DIR, verified; also while its service runs. Brings only what is new.

    Exits with 1 when something is damaged; that is left out, and named.
    """
    with told():
        from everstep.cli.backup import backup as command

        target = directory.expanduser().resolve()
        ok = command(existing_home(home), target, link=not copy, keep=keep, as_json=as_json)
    raise typer.Exit(0 if ok else 1)


@app.command()
def restore(
    directory: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False)],
    home: Home = DEFAULT_HOME,
    at: Annotated[
        str | None, typer.Option(metavar="ID", help="Which backup; the newest when not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a home of a backup. The home has to be empty or absent."""
    with told():
        from everstep.cli.backup import restore as command

        target = home.expanduser().resolve()
        command(directory.expanduser().resolve(), target, backup_id=at, as_json=as_json)


@app.command()
def conformance(
    base_url: Annotated[
        str, typer.Option(metavar="URL", envvar="TINKER_BASE_URL", help="The service's address.")
    ] = "http://127.0.0.1:8055",
    api_key: Annotated[
        str, typer.Option(metavar="KEY", envvar="TINKER_API_KEY", help="A key of the service.")
    ] = "tml-conformance",
    second_api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="A key of somebody else, to look whether they are apart."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The base model to train; none: the first listed."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="This check; may be repeated.")
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the checks and end.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write it as JUnit XML.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="How long to wait for one result.")
    ] = 120.0,
) -> None:
    """Check what ANY service of the Tinker protocol promises of checkpoints, over HTTP alone.

    Exits with 1 when a promise does not hold, or could not be looked at.
    """
    from everstep.cli.conformance import conformance as command
    from everstep.cli.conformance import list_checks
    from everstep.conformance import Target

    if list_them:
        list_checks()
        return
    target = Target(base_url, api_key, second_api_key, model, timeout)
    raise typer.Exit(command(target, only or [], json_file, junit_file))


def main() -> None:
    """Entry point of the command."""
    there = completion.join_words(os.environ)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # some locales lack what we print
    with completion.behind(there):
        app()
