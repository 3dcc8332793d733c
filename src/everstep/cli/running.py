"""The service that runs on a home: where it answers, and having it do what needs the home.

<home>/service.json     its address, written once it serves
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import httpx

from everstep.cli.errors import Refused

_FILE = "service.json"
_TIMEOUT_SECONDS = 600.0
_PROBE_SECONDS = 5.0


def announce(home: Path, address: str) -> None:
    """Note where the service of a home answers."""
    temporary = home / f".{_FILE}"
    temporary.write_text(json.dumps({"address": address}))
    temporary.replace(home / _FILE)


def retire(home: Path) -> None:
    """Note that it answers no more."""
    (home / _FILE).unlink(missing_ok=True)


def address(home: Path) -> str | None:
    """Where the service of a home answers; None when none listens there."""
    try:
        noted = str(json.loads((home / _FILE).read_text())["address"])
        url = httpx.URL(noted)
        with socket.create_connection((url.host, url.port or 80), _PROBE_SECONDS):
            return noted
    except (OSError, ValueError, KeyError):
        return None  # none was noted, or one that was killed


def ask(home: Path, route: str, body: dict[str, Any]) -> Any:
    """Have the service that runs on a home do something; returns its answer.

    Args:
        home: the home.
        route: below ``/api/v1``.
        body: the request.

    Raises:
        Refused: it doesn't say where it answers, doesn't answer, or refuses.
    """
    try:
        where = json.loads((home / _FILE).read_text())["address"]
    except (OSError, ValueError, KeyError) as error:
        raise Refused(
            f"{home} is in use by another everstep service or command, which doesn't say where it "
            "answers. Try again when it is done, or stop it."
        ) from error
    try:
        answer = httpx.post(f"{where}/api/v1/{route}", json=body, timeout=_TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise Refused(
            f"The service of {home} does not answer at {where}: {error!r}. Try again when it "
            "does, or stop it."
        ) from error
    if not answer.is_success:
        raise Refused(f"The service of {home} refused: {answer.text}")
    return answer.json()
