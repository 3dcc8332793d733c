"""Completion of run ids and checkpoint paths from the service, where it answers at once.

Bash takes a word apart at its colons, and replaces only what is behind the last one: so the pieces
are joined before typer sees them (`join_words`), and what is offered begins behind that colon
(`behind`). Other shells, and a bash whose COMP_WORDBREAKS has no colon, are given whole words.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

_SECONDS = 2.0


def join_words(environment: MutableMapping[str, str]) -> str:
    """Join the words of a command line that bash took apart, where bash asks for a completion.

    Args:
        environment: of the process, in which typer finds the words.

    Returns:
        What of the last word stays as it is; nothing where that was not taken apart.
    """
    if environment.get("_EVERSTEP_COMPLETE") != "complete_bash":
        return ""
    try:
        cursor = int(environment["COMP_CWORD"])
    except (KeyError, ValueError):
        return ""
    words: list[str] = []
    after_colon = joined = False
    for word in environment.get("COMP_WORDS", "").split("\n")[: cursor + 1]:
        colon = bool(word) and not word.strip(":")
        joined = bool(words) and (colon or after_colon)
        if joined:
            words[-1] += word
        else:
            words.append(word)
        after_colon = colon
    environment["COMP_WORDS"] = "\n".join(words)
    environment["COMP_CWORD"] = str(len(words) - 1)
    return words[-1][: words[-1].rfind(":") + 1] if joined else ""


@contextmanager
def behind(prefix: str) -> Iterator[None]:
    """Take a prefix from each line that is printed inside; without one, leave all alone."""
    if not prefix:
        yield
        return
    told = io.StringIO()
    try:
        with redirect_stdout(told):
            yield
    finally:
        for line in told.getvalue().splitlines():
            print(line.removeprefix(prefix))


def run_ids(incomplete: str, ctx: typer.Context | None = None) -> list[str]:
    """The runs whose id begins so."""
    answer = _ask("training_runs", ctx, limit=100)
    return _beginning(incomplete, answer.get("training_runs", []), "training_run_id")


def checkpoint_paths(incomplete: str, ctx: typer.Context | None = None) -> list[str]:
    """The checkpoints whose path begins so."""
    answer = _ask("checkpoints", ctx, limit=1000)
    return _beginning(incomplete, answer.get("checkpoints", []), "tinker_path")


def session_ids(incomplete: str, ctx: typer.Context | None = None) -> list[str]:
    """The sessions whose id begins so."""
    found = _ask("sessions", ctx, limit=100).get("sessions", [])
    return _beginning(incomplete, [{"id": each} for each in found], "id")


def _beginning(text: str, rows: list[dict[str, Any]], field: str) -> list[str]:
    return [row[field] for row in rows if str(row.get(field, "")).startswith(text)]


def _ask(route: str, ctx: typer.Context | None, **parameters: int) -> dict[str, Any]:
    """An answer of the service that the command would use; nothing where there is none in time."""
    import httpx

    from everstep.cli import running
    from everstep.cli.options import DEFAULT_HOME

    typed = {} if ctx is None else ctx.params
    home = Path(typed.get("home") or os.environ.get("EVERSTEP_HOME") or DEFAULT_HOME).expanduser()
    given = typed.get("base_url") or os.environ.get("TINKER_BASE_URL")
    url = running.address(home, wait=False) if given in (None, "", "local") else given
    if url is None:
        return {}
    key = typed.get("api_key") or os.environ.get("TINKER_API_KEY", "")
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/api/v1/{route}",
            params=parameters,
            headers={"X-API-Key": key},
            timeout=_SECONDS,
        )
        content = answer.json() if answer.is_success else {}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}  # a completion has nobody to tell
    return content if isinstance(content, dict) else {}


RunId = Annotated[str, typer.Argument(metavar="RUN", autocompletion=run_ids)]
CheckpointPath = Annotated[
    str, typer.Argument(metavar="PATH", help="tinker://…", autocompletion=checkpoint_paths)
]
CheckpointPaths = Annotated[
    list[str], typer.Argument(metavar="PATH", help="tinker://…", autocompletion=checkpoint_paths)
]
SessionId = Annotated[str, typer.Argument(metavar="SESSION", autocompletion=session_ids)]
SomeCheckpoints = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="tinker://…", autocompletion=checkpoint_paths),
]
