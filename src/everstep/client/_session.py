"""A session with a service: its flags, its id, its heartbeat."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from everstep.client._errors import TinkerError
from everstep.client._hooks import Hook
from everstep.client._http import Http
from everstep.client._version import VERSION
from everstep.wire.requests import CreateSessionRequest
from everstep.wire.responses import ClientConfigResponse, CreateSessionResponse

_log = logging.getLogger("everstep.client")
_HEARTBEAT_SECONDS = 10.0
_GONE = 410
SDK_VERSION = "0.38.0"
"""The release of the protocol that this client speaks."""


class Session:
    """A session that is opened when it is first needed.

    Args:
        http: the service.
        request: what the session is opened with.
        hooks: told of every operation.
    """

    def __init__(self, http: Http, request: CreateSessionRequest, hooks: Sequence[Hook]) -> None:
        self.http = http
        self.hooks = tuple(hooks)
        self.config = ClientConfigResponse()
        self._request = request
        self._opening: asyncio.Task[str] | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._counts = {"model": 0, "sampler": 0}
        self._lock = threading.Lock()

    def next_id(self, kind: str) -> int:
        """The next of the session's numbers for runs (``model``) or samplers (``sampler``)."""
        with self._lock:
            number = self._counts[kind]
            self._counts[kind] += 1
            return number

    async def id(self) -> str:
        """The session's id, opening it when that hasn't been done."""
        if self._opening is None or (self._opening.done() and self._opening.exception()):
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def configure(self) -> ClientConfigResponse:
        """Ask for the service's flags."""
        self.config = await self.http.call(
            "POST", "/client/config", ClientConfigResponse, json={"sdk_version": SDK_VERSION}
        )
        return self.config

    async def finish(self, reason: str, detail: str | None) -> None:
        """End the session, if it was opened."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._opening is None:
            return
        session_id = await self.id()
        body: Mapping[str, Any] = {"reason": {"type": reason}, "detail": detail}
        await self.http.request("POST", f"/sessions/{session_id}/finish", json=body)

    async def _open(self) -> str:
        await self.configure()
        answer = await self.http.call(
            "POST",
            "/create_session",
            CreateSessionResponse,
            json=self._request.model_dump(mode="json", exclude_none=True),
        )
        for level, text in (
            (logging.INFO, answer.info_message),
            (logging.WARNING, answer.warning_message),
            (logging.ERROR, answer.error_message),
        ):
            if text:
                _log.log(level, "%s", text)
        self._heartbeat = asyncio.create_task(self._beat(answer.session_id))
        return answer.session_id

    async def _beat(self, session_id: str) -> None:
        """Say that this client is alive, until the session is finished."""
        body = {"session_id": session_id, "type": "session_heartbeat"}
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                response = await self.http.send(
                    "POST", "/session_heartbeat", json=body, timeout=_HEARTBEAT_SECONDS
                )
            except TinkerError as error:
                _log.debug("heartbeat not answered: %s", error)
                continue
            if response.status_code == _GONE:
                return


def session_request(
    user_metadata: Mapping[str, Any] | None,
    project_id: str | None,
    display_name: str | None,
    tags: Sequence[str],
) -> CreateSessionRequest:
    """What a session is opened with."""
    return CreateSessionRequest(
        tags=list(tags),
        user_metadata=dict(user_metadata or {}),
        sdk_version=VERSION,
        project_id=project_id,
        display_name=display_name,
    )
