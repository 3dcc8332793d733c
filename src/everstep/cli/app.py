"""The ``everstep`` command line: its groups, its commands and its entry point."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from everstep._version import __version__
from everstep.addresses import exempt_loopback
from everstep.cli.backup.app import backup, restore
from everstep.cli.checkpoint.app import app as checkpoint
from everstep.cli.common import completion
from everstep.cli.common.groups import command_group
from everstep.cli.conformance.app import conformance
from everstep.cli.doctor.app import doctor
from everstep.cli.ledger.app import app as ledger
from everstep.cli.mirror.app import mirror
from everstep.cli.quickstart.app import quickstart
from everstep.cli.run.app import app as runs
from everstep.cli.sample.app import sample
from everstep.cli.serve.app import app as serve
from everstep.cli.session.app import app as session
from everstep.cli.train.app import train
from everstep.cli.vault.app import app as vault

app = command_group("everstep", "Fine-tuning over the Tinker protocol that never loses a step.")
for command in (train, sample, quickstart):
    app.command()(command)
app.add_typer(serve)
app.command()(doctor)
for group in (runs, checkpoint, session):
    app.add_typer(group)
for command in (mirror, conformance, backup, restore):
    app.command()(command)
for group in (vault, ledger):
    app.add_typer(group)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"everstep {__version__}")
        raise typer.Exit


@app.callback()
def _everstep(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Fine-tuning over the Tinker protocol that never loses a step."""


def run() -> None:
    """Run the command line of this process."""
    exempt_loopback(os.environ)
    prefix = completion.join_words(os.environ)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # some locales lack what we print
    with completion.strip_prefix(prefix):
        app()
