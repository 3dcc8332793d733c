"""Transport: raw requests to a service, with a short record of each request and response."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from everstep.addresses import without_proxies
from everstep.backoff import Backoff

_PREFIX = "/api/v1"
_MAX_RECORD_LENGTH = 400
_BUSY = frozenset({429, 503})
_BACKOFF = Backoff(initial=0.5, max=8.0)
_READ_SECONDS = 60.0


class Unreachable(Exception):
    """The service did not respond to a request."""


@dataclass(frozen=True)
class Exchange:
    """One request and its response.

    Attributes:
        sent: method, path and body, shortened.
        status: the HTTP status.
        content_type: of the response.
        body: of the response.
    """

    sent: str
    status: int
    content_type: str = ""
    body: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def refused(self) -> bool:
        """Whether the status is 4xx: the request was wrong."""
        return 400 <= self.status < 500

    @property
    def came_back(self) -> str:
        """The response, shortened."""
        if "json" in self.content_type or self.content_type.startswith("text/"):
            return f"{self.status} {short(self.body.decode(errors='replace'))}".strip()
        return f"{self.status} ({len(self.body)} bytes of {self.content_type or 'nothing'})"

    def json(self) -> dict[str, Any]:
        """Return the response as a JSON object, or an empty one if it is not."""
        try:
            content = json.loads(self.body)
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def short(text: str, limit: int = _MAX_RECORD_LENGTH) -> str:
    """Return the text on one line, truncated if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class Transport:
    """Sends requests with one key.

    Args:
        base_url: the service's address, with or without ``/api/v1``. A path prefix is kept.
        api_key: sent as ``X-API-Key``.
        patience: seconds to retry while the service is busy (429, 503).
    """

    def __init__(self, base_url: str, api_key: str, patience: float = 60.0) -> None:
        base = base_url.rstrip("/").removesuffix(_PREFIX)
        if urlsplit(base).scheme not in ("http", "https"):
            raise Unreachable(
                f"{base_url!r} is not a URL: it has to begin with http:// or https://."
            )
        self._base = base + _PREFIX
        self._patience = patience
        self._http = httpx.Client(
            headers={"X-API-Key": api_key, "Accept": "application/json"},
            timeout=httpx.Timeout(_READ_SECONDS, connect=10.0),
            follow_redirects=True,
            mounts=without_proxies(base),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        note: str | None = None,
        timeout: float | None = None,
    ) -> Exchange:
        """Send a request, retrying while the service is busy.

        Args:
            method: GET, POST, …
            path: below ``/api/v1``, sent unchanged, so already encoded.
            body: sent as JSON.
            content: sent instead of ``body``.
            headers: in addition to those of every request.
            note: recorded instead of the body.
            timeout: seconds until the response.

        Raises:
            Unreachable: there was no response.
        """
        summary = note if note is not None else ("" if body is None else json.dumps(body))
        sent = short(f"{method} {path} {summary}")
        deadline = time.monotonic() + self._patience
        attempt = 0
        while True:
            delay = _BACKOFF.delay(attempt)
            attempt += 1
            try:
                answer = self._http.request(
                    method,
                    self._base + path,
                    json=body if content is None else None,
                    content=content,
                    headers=headers,
                    timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout,
                )
            except httpx.HTTPError as error:
                raise Unreachable(f"{sent}: {type(error).__name__} {error}".strip()) from error
            if answer.status_code not in _BUSY or time.monotonic() + delay > deadline:
                kind = answer.headers.get("content-type", "")
                return Exchange(sent, answer.status_code, kind, answer.content)
            time.sleep(delay)
