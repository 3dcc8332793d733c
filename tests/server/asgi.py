"""Requests as the server hands them to the application: in parts, and with an early end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from tests.runtime.local import Local

PART_BYTES = 64 << 10
"""Of a body, as the server reads it from a socket."""


def parts(body: bytes) -> Iterable[bytes]:
    return (body[at : at + PART_BYTES] for at in range(0, len(body), PART_BYTES))


async def call(
    app: Any,
    path: str,
    body: Iterable[bytes],
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "POST",
    then: str = "end",
) -> list[dict[str, Any]]:
    """Call the application; returns what it sends.

    Args:
        app: the application.
        path: of the request, with its prefix.
        body: its parts.
        headers: of the request.
        method: of the request.
        then: what follows the body: its ``end``, a ``disconnect``, or ``silence``.
    """
    sent: list[dict[str, Any]] = []
    left = iter(body)

    async def receive() -> dict[str, Any]:
        part = next(left, None)
        if part is not None:
            return {"type": "http.request", "body": part, "more_body": True}
        if then == "silence":
            await asyncio.Event().wait()
        if then == "disconnect":
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "state": {},
    }
    await app(scope, receive, send)
    return sent


def request(local: Local, path: str, body: Iterable[bytes], **more: Any) -> list[dict[str, Any]]:
    """Call a service's application in its event loop; returns what it sends."""

    async def run() -> list[dict[str, Any]]:
        return await call(local.app, path, body, **more)

    assert local.http.portal is not None
    found: list[dict[str, Any]] = local.http.portal.call(run)
    return found
