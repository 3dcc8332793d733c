"""The service that runs on a home: where it answers, and having it do what needs the home.

<home>/service.json     its address, written once it serves, and the process that it ends with
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import httpx

from everstep.cli.errors import Refused

_FILE = "service.json"
_TIMEOUT_SECONDS = 600.0
_PROBE_SECONDS = 5.0
_STOP_SECONDS = 120.0


def announce(home: Path, address: str, owner: int | None = None) -> None:
    """Note where the service of a home answers.

    Args:
        home: the home.
        address: of the service.
        owner: the process that it ends with; None: it stays.
    """
    temporary = home / f".{_FILE}"
    temporary.write_text(json.dumps({"address": address, "owner": owner}))
    temporary.replace(home / _FILE)


def retire(home: Path) -> None:
    """Note that it answers no more."""
    (home / _FILE).unlink(missing_ok=True)


def address(home: Path, *, wait: bool = True) -> str | None:
    """Where the service of a home answers; None when none listens there.

    Args:
        home: the home.
        wait: for the end of one whose owner has gone, so that another can be started: it parks its
            runs first.

    Raises:
        Refused: it does not end.
    """
    try:
        noted = json.loads((home / _FILE).read_text())
        url, owner = httpx.URL(str(noted["address"])), noted.get("owner")
    except (OSError, ValueError, KeyError):
        return None
    if owner is not None and not _lives(int(owner)):
        if wait:
            _wait_for_end(home)
        return None
    try:
        with socket.create_connection((url.host, url.port or 80), _PROBE_SECONDS):
            return str(noted["address"])
    except OSError:
        return None  # it was killed


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait_for_end(home: Path) -> None:
    """Wait until no service has a home, for as long as a stop may take."""
    from everstep.ledger.database import wait_unlocked

    if not wait_unlocked(home / "ledger.sqlite.lock", _STOP_SECONDS):
        raise Refused(
            f"The service of {home} has been ending for {_STOP_SECONDS:.0f} s: what it belonged to "
            "is gone. Try again later, or stop it."
        )


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
