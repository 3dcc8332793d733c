"""Paths of the hosted service, so that a script needs another host only."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

_REPLACED = (("/services/tinker-prod/", "/"), ("/oai/api/v1/", "/v1/"))


class HostedPaths:
    """Replaces the paths under which the hosted service serves its APIs by those of this one.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its path here."""
        for hosted, own in _REPLACED:
            path: str = scope.get("path", "")
            if path.startswith(hosted):
                raw: bytes = scope.get("raw_path") or path.encode()
                rest = raw.removeprefix(hosted.encode())
                path = own + path.removeprefix(hosted)
                scope = {**scope, "path": path, "raw_path": own.encode() + rest}
        await self._app(scope, receive, send)
