"""Credentials: the service's address and the caller's credential."""

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

from everstep.addresses import is_loopback
from everstep.client._transport.errors import TinkerError
from everstep.text_files import TextFileError, decode_text, read_text

LOCAL = "local"
_STORE = Path("~/.tinker/credentials.json")
_EXPIRY_MARGIN_SECONDS = 60.0
CREDENTIAL_HEADER = "X-API-Key"


def service_url(base_url: str | None) -> str:
    """Return the argument, ``TINKER_BASE_URL``, or ``local`` for an embedded service."""
    return base_url or os.environ.get("TINKER_BASE_URL") or LOCAL


def static_key(given: str | None = None) -> str | None:
    """Return the argument, ``TINKER_API_KEY``, or the key that ``tinker auth login`` stored.

    Raises:
        TinkerError: the key is malformed, or the store can't be read.
    """
    key = given or os.environ.get("TINKER_API_KEY") or _stored_key()
    if key is not None and not key.startswith(("tml-", "eyJ")):
        raise TinkerError("The API key has to begin with 'tml-'.")
    return key


def credential_command() -> str | None:
    """Return ``TINKER_CREDENTIAL_CMD``: a command that prints a credential."""
    return os.environ.get("TINKER_CREDENTIAL_CMD") or None


class Credential(httpx.Auth):
    """Adds a credential to every request.

    Its sources, in this order: the argument, ``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, the
    credentials file. A service on this machine needs none.

    Args:
        given: an API key.
        base_url: of the service.

    Raises:
        TinkerError: there is no credential, or it is malformed.
    """

    def __init__(self, given: str | None, base_url: str) -> None:
        given = given or os.environ.get("TINKER_API_KEY")
        self._command = None if given else credential_command()
        self._key = None if self._command else static_key(given)
        if not (self._key or self._command) and not is_loopback(urlsplit(base_url).hostname):
            raise TinkerError(
                "No API key: give api_key=…, set TINKER_API_KEY, or store one with "
                "`tinker auth login`."
            )
        self._fetch_token: Callable[[], Awaitable[str]] | None = None
        self._token: str | None = None
        self._lock = asyncio.Lock()

    def use_tokens(self, fetch: Callable[[], Awaitable[str]]) -> None:
        """Send tokens instead of the credential from now on.

        Args:
            fetch: exchanges the credential for a token at the service.
        """
        self._fetch_token = fetch

    async def token(self) -> str | None:
        """Return the token that requests carry, or None if credentials are not exchanged."""
        if self._fetch_token is None:
            return None
        async with self._lock:
            if self._token is None or expiry(self._token) - time.time() < _EXPIRY_MARGIN_SECONDS:
                self._token = await self._fetch_token()
            return self._token

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send a request with the credential, and once more if its token is rejected as invalid."""
        credential = await self.credential_for(request.url.path)
        if credential is not None:
            request.headers[CREDENTIAL_HEADER] = credential
        response = yield request
        if self.drop_rejected(credential, response):
            await response.aread()
            request.headers[CREDENTIAL_HEADER] = await self.token() or ""
            yield request

    async def credential_for(self, path: str) -> str | None:
        """Return the credential of a request, or None if it is sent without one.

        Args:
            path: of the request's URL.
        """
        uses_token = not path.endswith(("/auth/token", "/client/config"))
        credential = await self.token() if uses_token else None
        return credential or await self._configured_credential()

    def drop_rejected(self, credential: str | None, response: httpx.Response) -> bool:
        """Drop the token if a response says that it is invalid, and return whether that is so.

        Args:
            credential: that the request carried.
            response: to the request.
        """
        refused = 'error="invalid_token"' in response.headers.get("WWW-Authenticate", "")
        rejected = response.status_code == 401 and refused and credential == self._token
        if rejected:
            self._token = None
        return rejected

    async def _configured_credential(self) -> str | None:
        if self._command is None:
            return self._key
        process = await asyncio.create_subprocess_shell(
            self._command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        printed, _ = await process.communicate()
        try:
            credential = decode_text(printed, "the output of TINKER_CREDENTIAL_CMD").strip()
        except TextFileError as error:
            raise TinkerError(str(error)) from error
        if process.returncode != 0 or not credential:
            raise TinkerError(
                f"TINKER_CREDENTIAL_CMD exited with code {process.returncode} and printed "
                f"{'a' if credential else 'no'} credential."
            )
        return credential


def claims(jwt: str) -> dict[str, Any]:
    """Decode a token's claims. Raises ValueError if it can't be decoded."""
    try:
        payload = jwt.split(".")[1]
        content = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, binascii.Error, ValueError) as error:
        raise ValueError("the service's token can't be read") from error
    if not isinstance(content, dict):
        raise ValueError("the service's token can't be read")
    return content


def expiry(jwt: str) -> float:
    """Return a token's expiry in seconds since the epoch, or 0 if it has none."""
    try:
        return float(claims(jwt)["exp"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0.0


def _stored_key() -> str | None:
    """Return the default key of the official SDK's store."""
    try:
        path = _STORE.expanduser()
    except RuntimeError:  # this user has no home directory
        return None
    try:
        content = json.loads(read_text(path))
        record = (content.get("keys") or {}).get(content.get("default"))
        key = record["key"] if record else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise TinkerError(f"{path} can't be read: {error}") from error
    return key if isinstance(key, str) else None
