"""Options of ``everstep session``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from everstep.cli.common.completion import SessionId, SessionIds
from everstep.cli.common.groups import command_group
from everstep.cli.common.options import DryRun, Limit, Yes
from everstep.cli.common.target import Target, with_target

app = command_group("session", "List, inspect and manage the sessions of clients.")


@app.command("list")
@with_target
def list_(target: Target, limit: Limit = 20) -> None:
    """List sessions, newest first."""
    from everstep.cli.session.search import print_all

    print_all(target, limit)


@app.command()
@with_target
def search(
    target: Target,
    words: Annotated[
        str | None, typer.Argument(metavar="WORDS", help="Words of the display name.")
    ] = None,
    project: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Project of the sessions; may be repeated."),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Entry of user_metadata; may be repeated."),
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATUS",
            help="Status: active, success, errored, interrupted, failed or cancelled; may be "
            "repeated.",
        ),
    ] = None,
    limit: Limit = 0,
) -> None:
    """Search sessions, newest first.

    A session has to meet all conditions.
    """
    from everstep.cli.session.search import print_matching, search_request

    wanted = search_request(words, project or [], metadata or [], status or [])
    print_matching(target, wanted, limit)


@app.command()
@with_target
def info(target: Target, session_id: SessionId) -> None:
    """Show a session with its runs and samplers."""
    from everstep.cli.session.manage import print_session

    print_session(target, session_id)


@app.command()
@with_target
def finish(
    target: Target,
    session_id: SessionId,
    reason: Annotated[
        Literal["success", "errored", "interrupted"], typer.Option(help="How the session ended.")
    ] = "interrupted",
    yes: Yes = False,
) -> None:
    """End a session.

    Its runs accept no more operations. Checkpoints stay.
    """
    from everstep.cli.session.manage import finish_session

    finish_session(target, session_id, reason, yes)


@app.command()
@with_target
def delete(
    target: Target,
    sessions: SessionIds,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Delete sessions permanently, with all that they own.

    That is their runs with their checkpoints, samplers and custom losses. Lists them with their
    size and asks for a confirmation. A session whose client is alive is refused.
    """
    from everstep.cli.session.delete import delete_sessions

    delete_sessions(target, sessions, dry_run=dry_run, yes=yes)


@app.command()
@with_target
def move(
    target: Target,
    session_id: SessionId,
    project: Annotated[
        str, typer.Argument(metavar="PROJECT", help="Project to move the session to.")
    ],
) -> None:
    """Move a session and its runs to a project."""
    from everstep.cli.session.manage import move_session

    move_session(target, session_id, project)


@app.command("export-trace")
@with_target
def export_trace(
    target: Target,
    session_id: SessionId,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write. [default: SESSION.trace.json]",
            show_default=False,
        ),
    ] = None,
    url_only: Annotated[
        bool, typer.Option("--url-only", help="Print the address instead of fetching the trace.")
    ] = False,
) -> None:
    """Download a session's timeline.

    Open it at https://ui.perfetto.dev.
    """
    from everstep.cli.session.manage import download_trace

    download_trace(target, session_id, output, url_only)
