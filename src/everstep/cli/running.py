"""The service that runs on a home: where it answers, and having it do what needs the home.

<home>/service.json     its address, written once it serves
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from everstep.cli.options import Refused

_FILE = "service.json"
_TIMEOUT_SECONDS = 600.0


def announce(home: Path, address: str) -> None:
    """Note where the service of a home answers."""
    temporary = home / f".{_FILE}"
    temporary.write_text(json.dumps({"address": address}))
    temporary.replace(home / _FILE)


def retire(home: Path) -> None:
    """Note that it answers no more."""
    (home / _FILE).unlink(missing_ok=True)


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
        address = json.loads((home / _FILE).read_text())["address"]
    except (OSError, ValueError, KeyError) as error:
        raise Refused(
            f"{home} is in use by another everstep service or command, which doesn't say where it "
            "answers. Try again when it is done, or stop it."
        ) from error
    try:
        answer = httpx.post(f"{address}/api/v1/{route}", json=body, timeout=_TIMEOUT_SECONDS)
    except httpx.HTTPError as error:
        raise Refused(
            f"The service of {home} does not answer at {address}: {error!r}. Try again when it "
            "does, or stop it."
        ) from error
    if not answer.is_success:
        raise Refused(f"The service of {home} refused: {answer.text}")
    return answer.json()
