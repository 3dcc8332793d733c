"""Where the service is, and what it is told of who calls."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from everstep.client._errors import TinkerError

LOCAL = "local"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_STORE = Path("~/.tinker/credentials.json")
_SPARE_SECONDS = 60.0
_HEADER = "X-API-Key"


def service_url(base_url: str | None) -> str:
    """The argument, ``TINKER_BASE_URL``, or ``local``: an embedded service."""
    return base_url or os.environ.get("TINKER_BASE_URL") or LOCAL


def static_key(given: str | None = None) -> str | None:
    """The argument, ``TINKER_API_KEY``, or the key that ``tinker auth login`` stored.

    Raises:
        TinkerError: it can't be a key, or the store can't be read.
    """
    key = given or os.environ.get("TINKER_API_KEY") or _stored_key()
    if key is not None and not key.startswith(("tml-", "eyJ")):
        raise TinkerError("The API key has to begin with 'tml-'.")
    return key


def credential_command() -> str | None:
    """``TINKER_CREDENTIAL_CMD``: a command that prints a credential."""
    return os.environ.get("TINKER_CREDENTIAL_CMD") or None


class Credential(httpx.Auth):
    """Puts a credential on every request.

    Its sources, in this order: the argument, ``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, the
    credentials file. A service on this machine needs none.

    Args:
        given: an API key.
        base_url: of the service.

    Raises:
        TinkerError: there is none, or it can't be one.
    """

    def __init__(self, given: str | None, base_url: str) -> None:
        given = given or os.environ.get("TINKER_API_KEY")
        self._command = None if given else credential_command()
        self._key = None if self._command else static_key(given)
        if not (self._key or self._command) and urlsplit(base_url).hostname not in _LOOPBACK:
            raise TinkerError(
                "No API key: give api_key=…, set TINKER_API_KEY, or store one with "
                "`tinker auth login`."
            )
        self._exchange: Callable[[], Awaitable[str]] | None = None
        self._token: str | None = None
        self._lock = asyncio.Lock()

    def exchange(self, ask: Callable[[], Awaitable[str]]) -> None:
        """From now on, put a token on requests instead.

        Args:
            ask: gets a token for the credential from the service.
        """
        self._exchange = ask

    async def token(self) -> str | None:
        """The token that requests carry; None when the service doesn't exchange credentials."""
        if self._exchange is None:
            return None
        async with self._lock:
            if self._token is None or expiry(self._token) - time.time() < _SPARE_SECONDS:
                self._token = await self._exchange()
            return self._token

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send a request with the credential; once more if its token is refused as invalid."""
        exchanged = not request.url.path.endswith(("/auth/token", "/client/config"))
        credential = await self.token() if exchanged else None
        credential = credential or await self._own()
        if credential is not None:
            request.headers[_HEADER] = credential
        response = yield request
        refused = 'error="invalid_token"' in response.headers.get("WWW-Authenticate", "")
        if response.status_code == 401 and refused and credential == self._token:
            await response.aread()
            self._token = None
            request.headers[_HEADER] = await self.token() or ""
            yield request

    async def _own(self) -> str | None:
        if self._command is None:
            return self._key
        process = await asyncio.create_subprocess_shell(
            self._command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        printed, _ = await process.communicate()
        credential = printed.decode().strip()
        if process.returncode != 0 or not credential:
            raise TinkerError(
                f"TINKER_CREDENTIAL_CMD ended with exit code {process.returncode} and printed "
                f"{'a' if credential else 'no'} credential."
            )
        return credential


def claims(jwt: str) -> dict[str, Any]:
    """What a token says of its bearer; raises ValueError when it isn't a token."""
    try:
        payload = jwt.split(".")[1]
        content = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, binascii.Error, ValueError) as error:
        raise ValueError("the service's token can't be read") from error
    if not isinstance(content, dict):
        raise ValueError("the service's token can't be read")
    return content


def expiry(jwt: str) -> float:
    """When a token expires, in seconds since the epoch; 0 when it doesn't say."""
    try:
        return float(claims(jwt)["exp"])
    except (ValueError, KeyError, TypeError):
        return 0.0


def _stored_key() -> str | None:
    """The default of the keys in the official SDK's store."""
    path = _STORE.expanduser()
    try:
        content = json.loads(path.read_text())
        record = (content.get("keys") or {}).get(content.get("default"))
        key = record["key"] if record else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise TinkerError(f"{path} can't be read: {error}") from error
    return key if isinstance(key, str) else None
