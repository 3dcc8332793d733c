"""Where the service is and which key it takes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from everstep.client._errors import TinkerError

LOCAL = "local"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_STORE = Path("~/.tinker/credentials.json")


def service_url(base_url: str | None) -> str:
    """The argument, ``TINKER_BASE_URL``, or ``local``: an embedded service."""
    return base_url or os.environ.get("TINKER_BASE_URL") or LOCAL


def api_key(given: str | None, base_url: str) -> str | None:
    """The argument, ``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, or the credentials file.

    A service on this machine needs none.

    Raises:
        TinkerError: there is none, or it can't be one.
    """
    key = given or os.environ.get("TINKER_API_KEY") or _from_command() or _from_store()
    if key is None:
        if urlsplit(base_url).hostname in _LOOPBACK:
            return None
        raise TinkerError("No API key: give api_key=…, or set TINKER_API_KEY.")
    if not key.startswith(("tml-", "eyJ")):
        raise TinkerError("The API key has to begin with 'tml-'.")
    return key


def _from_command() -> str | None:
    command = os.environ.get("TINKER_CREDENTIAL_CMD")
    if not command:
        return None
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TinkerError(f"TINKER_CREDENTIAL_CMD failed with exit code {done.returncode}.")
    return done.stdout.strip() or None


def _from_store() -> str | None:
    path = _STORE.expanduser()
    if not path.exists():
        return None
    try:
        key = json.loads(path.read_text()).get("api_key")
    except (OSError, ValueError, AttributeError) as error:
        raise TinkerError(f"{path} can't be read: {error}") from error
    return key if isinstance(key, str) else None
