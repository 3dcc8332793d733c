"""Raw requests to a service, and a short record of each: what was sent, what came back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

_PREFIX = "/api/v1"
_SHORT = 400
_BUSY = frozenset({429, 503})
_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 8.0
_READ_SECONDS = 60.0


class Unreachable(Exception):
    """The service did not answer a request."""


@dataclass(frozen=True)
class Exchange:
    """One request and its answer.

    Attributes:
        sent: method, path and body, shortened.
        status: the HTTP status.
        content_type: of the answer.
        body: the answer.
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
        """Whether the service says that the request was wrong (4xx)."""
        return 400 <= self.status < 500

    @property
    def came_back(self) -> str:
        """The answer, shortened."""
        if "json" in self.content_type or self.content_type.startswith("text/"):
            return f"{self.status} {short(self.body.decode(errors='replace'))}".strip()
        return f"{self.status} ({len(self.body)} bytes of {self.content_type or 'nothing'})"

    def json(self) -> dict[str, Any]:
        """The answer as a JSON object; an empty one where it is none."""
        try:
            content = json.loads(self.body)
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def short(text: str, limit: int = _SHORT) -> str:
    """The text on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


class Transport:
    """Requests with one key.

    Args:
        base_url: the service's address, with or without ``/api/v1``; a path prefix is kept.
        api_key: sent as ``X-API-Key``.
        patience: seconds to go on while the service says that it is busy (429, 503).
    """

    def __init__(self, base_url: str, api_key: str, patience: float = 60.0) -> None:
        base = base_url.rstrip("/").removesuffix(_PREFIX)
        if urlsplit(base).scheme not in ("http", "https"):
            raise Unreachable(f"{base_url!r} is not an address: begin with http:// or https://.")
        self._base = base + _PREFIX
        self._patience = patience
        self._http = httpx.Client(
            headers={"X-API-Key": api_key, "Accept": "application/json"},
            timeout=httpx.Timeout(_READ_SECONDS, connect=10.0),
            follow_redirects=True,
        )

    def close(self) -> None:
        """Close its connections."""
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
        """Send a request; again while the service is busy.

        Args:
            method: GET, POST, …
            path: below ``/api/v1``, sent as it is: encode what has to be.
            body: sent as JSON.
            content: sent instead of ``body``.
            headers: added to those of every request.
            note: what the record says instead of the body.
            timeout: seconds until the answer.

        Raises:
            Unreachable: there was no answer.
        """
        said = note if note is not None else ("" if body is None else json.dumps(body))
        sent = short(f"{method} {path} {said}")
        deadline = time.monotonic() + self._patience
        pause = _PAUSE_SECONDS
        while True:
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
            if answer.status_code not in _BUSY or time.monotonic() + pause > deadline:
                kind = answer.headers.get("content-type", "")
                return Exchange(sent, answer.status_code, kind, answer.content)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
