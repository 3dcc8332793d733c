"""``everstep session``: list, info, search, finish, move, export-trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from everstep.cli.completion import SessionId
from everstep.cli.options import Yes
from everstep.cli.target import Target, with_target

app = typer.Typer(
    name="session",
    help="Look at clients' sessions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("list")
@with_target
def list_(
    target: Target,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="At most; 0: all.")] = 20,
) -> None:
    """List sessions, newest first."""
    from everstep.cli import session_work

    session_work.show_all(target, limit)


@app.command()
@with_target
def search(
    target: Target,
    words: Annotated[
        str | None, typer.Argument(metavar="WORDS", help="That are in its display name.")
    ] = None,
    project: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="In this project; may be repeated.")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With that in user_metadata; may be repeated."),
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATUS",
            help="active, success, errored, interrupted, failed or cancelled; may be repeated.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="At most; 0: all.")] = 0,
) -> None:
    """Find sessions that meet all that is given, newest first."""
    from everstep.cli import session_work

    with_ = session_work.request(words, project or [], metadata or [], status or [])
    session_work.show_found(target, with_, limit)


@app.command()
@with_target
def info(target: Target, session_id: SessionId) -> None:
    """Say what a session is, with its runs and samplers."""
    from everstep.cli import session_work

    session_work.show(target, session_id)


@app.command()
@with_target
def finish(
    target: Target,
    session_id: SessionId,
    reason: Annotated[
        Literal["success", "errored", "interrupted"], typer.Option(help="How it ended.")
    ] = "interrupted",
    yes: Yes = False,
) -> None:
    """End a session: its runs take no more operations. Checkpoints stay."""
    from everstep.cli import session_work

    session_work.finish(target, session_id, reason, yes)


@app.command()
@with_target
def move(
    target: Target,
    session_id: SessionId,
    project: Annotated[str, typer.Argument(metavar="PROJECT")],
) -> None:
    """Move a session, with its runs, into a project."""
    from everstep.cli import session_work

    session_work.move(target, session_id, project)


@app.command("export-trace")
@with_target
def export_trace(
    target: Target,
    session_id: SessionId,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="None: SESSION.trace.json here."),
    ] = None,
    url_only: Annotated[
        bool, typer.Option("--url-only", help="Print the address, fetch nothing.")
    ] = False,
) -> None:
    """Fetch a session's time line, for https://ui.perfetto.dev."""
    from everstep.cli import session_work

    session_work.export_trace(target, session_id, output, url_only)
