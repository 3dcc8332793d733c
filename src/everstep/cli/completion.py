"""Completion of run ids and checkpoint paths from the service, where it answers at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

_SECONDS = 2.0


def run_ids(incomplete: str) -> list[str]:
    """The runs whose id begins so."""
    answer = _ask("training_runs", limit=100)
    return _beginning(incomplete, answer.get("training_runs", []), "training_run_id")


def checkpoint_paths(incomplete: str) -> list[str]:
    """The checkpoints whose path begins so."""
    answer = _ask("checkpoints", limit=1000)
    return _beginning(incomplete, answer.get("checkpoints", []), "tinker_path")


def _beginning(text: str, rows: list[dict[str, Any]], field: str) -> list[str]:
    return [row[field] for row in rows if str(row.get(field, "")).startswith(text)]


def _ask(route: str, **parameters: int) -> dict[str, Any]:
    """An answer of the service that commands would use; nothing where there is none in time."""
    import httpx

    from everstep.cli import running
    from everstep.cli.options import DEFAULT_HOME

    home = Path(os.environ.get("EVERSTEP_HOME", DEFAULT_HOME)).expanduser()
    url = os.environ.get("TINKER_BASE_URL") or running.address(home, wait=False)
    if url is None:
        return {}
    headers = {"X-API-Key": os.environ.get("TINKER_API_KEY", "")}
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}/api/v1/{route}",
            params=parameters,
            headers=headers,
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
SomeCheckpoints = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="tinker://…", autocompletion=checkpoint_paths),
]
