"""Shell completion of run ids, checkpoint paths and session ids: the service's, or the home's.

Bash splits words at colons and replaces only the part behind the last colon. So the pieces are
joined before typer sees them (`join_words`), and the part up to that colon is removed from the
completions (`strip_prefix`). Other shells, and a bash without a colon in COMP_WORDBREAKS, get
whole words.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

_SECONDS = 2.0


def join_words(environment: MutableMapping[str, str]) -> str:
    """Join the words that bash split, if bash asks for a completion.

    Args:
        environment: environment of the process, from which typer reads the words.

    Returns:
        The part of the last word that bash keeps, or empty if the word was not split.
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
def strip_prefix(prefix: str) -> Iterator[None]:
    """Remove a prefix from each line that is printed inside. An empty one changes nothing."""
    if not prefix:
        yield
        return
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            print(line.removeprefix(prefix))


def run_ids(incomplete: str, ctx: typer.Context | None = None) -> list[str]:
    """Complete the id of a run."""
    answer = _query("training_runs", ctx, limit=100)
    runs = answer.get("training_runs", [])
    names = [{"name": (each.get("user_metadata") or {}).get("everstep_run")} for each in runs]
    named = [each for each in names if each["name"]]
    return list(
        dict.fromkeys(
            _starting_with(incomplete, runs, "training_run_id")
            + _starting_with(incomplete, named, "name")
        )
    )


def checkpoint_paths(incomplete: str, ctx: typer.Context | None = None) -> list[str]:
    """Complete the path of a checkpoint."""
    answer = _query("checkpoints", ctx, limit=1000)
    return _starting_with(incomplete, answer.get("checkpoints", []), "tinker_path")


def session_ids(incomplete: str, ctx: typer.Context | None = None) -> list[str]:
    """Complete the id of a session."""
    found = _query("sessions", ctx, limit=100).get("sessions", [])
    return _starting_with(incomplete, [{"id": each} for each in found], "id")


def _starting_with(text: str, rows: list[dict[str, Any]], field: str) -> list[str]:
    return [row[field] for row in rows if str(row.get(field, "")).startswith(text)]


def _query(route: str, ctx: typer.Context | None, **parameters: int) -> dict[str, Any]:
    """Query what the command would read. Returns {} if it does not answer in time."""
    import httpx

    from everstep.addresses import without_proxies
    from everstep.cli.common import service_file
    from everstep.cli.common.options import DEFAULT_HOME

    typed = {} if ctx is None else ctx.params
    home = Path(typed.get("home") or os.environ.get("EVERSTEP_HOME") or DEFAULT_HOME)
    given = typed.get("base_url") or os.environ.get("TINKER_BASE_URL")
    with contextlib.suppress(RuntimeError):  # no home directory
        home = home.expanduser()
    url = service_file.find_address(home) if given in (None, "", "local") else given
    key = typed.get("api_key") or os.environ.get("TINKER_API_KEY", "")
    if url is None:
        return _query_home(home, key or None, route, parameters)
    try:
        with httpx.Client(timeout=_SECONDS, mounts=without_proxies(url)) as client:
            answer = client.get(
                f"{url.rstrip('/')}/api/v1/{route}", params=parameters, headers={"X-API-Key": key}
            )
        content = answer.json() if answer.is_success else {}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}  # a completion has no place for an error
    return content if isinstance(content, dict) else {}


def _query_home(
    home: Path, key: str | None, route: str, parameters: dict[str, int]
) -> dict[str, Any]:
    """Query the files of a home. Returns {} if there is none, or it can't be read."""
    if not (home / "ledger.sqlite").is_file():
        return {}
    from everstep.cli.common.home_transport import connect
    from everstep.client._transport.errors import TinkerError
    from everstep.client._transport.futures import submit
    from everstep.ledger import LedgerError

    try:
        with connect(home, key) as connection:
            answer = submit(connection.http.send("GET", f"/{route}", params=parameters))
            content = answer.result(_SECONDS).json()
    except (LedgerError, TinkerError, OSError, ValueError, TimeoutError):
        return {}
    return content if isinstance(content, dict) else {}


_CHECKPOINT = "Checkpoint: its path (tinker://…), RUN:NAME, or RUN:latest."
_CHECKPOINTS = "Checkpoints: their paths (tinker://…), RUN:NAME, or RUN:latest."
RunId = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Run: its id, the beginning of its id, or its name.",
        autocompletion=run_ids,
    ),
]
RunIds = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN",
        help="Runs: their ids, the beginnings of their ids, or their names.",
        autocompletion=run_ids,
    ),
]
CheckpointPath = Annotated[
    str,
    typer.Argument(metavar="PATH", help=_CHECKPOINT, autocompletion=checkpoint_paths),
]
CheckpointPaths = Annotated[
    list[str],
    typer.Argument(metavar="PATH", help=_CHECKPOINTS, autocompletion=checkpoint_paths),
]
SessionId = Annotated[
    str,
    typer.Argument(
        metavar="SESSION",
        help="Session: its id, or the beginning of it.",
        autocompletion=session_ids,
    ),
]
SessionIds = Annotated[
    list[str],
    typer.Argument(
        metavar="SESSION",
        help="Sessions: their ids, or the beginnings of them.",
        autocompletion=session_ids,
    ),
]
OptionalCheckpointPaths = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help=_CHECKPOINTS, autocompletion=checkpoint_paths),
]
