"""A session with a service: its flags, its id, its heartbeat."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import httpx

from everstep.client._budgets import Budgets
from everstep.client._credentials import Credential
from everstep.client._errors import APIError, TinkerError
from everstep.client._hooks import Hook
from everstep.client._http import Http
from everstep.client._local import failure_at
from everstep.client._telemetry import Telemetry, enabled
from everstep.client._version import VERSION
from everstep.wire.administration import AuthTokenResponse
from everstep.wire.requests import CreateSessionRequest
from everstep.wire.responses import (
    ClientConfigResponse,
    ClientDynamicConfigResponse,
    CreateSessionResponse,
)

_log = logging.getLogger("everstep.client")
_HEARTBEAT_SECONDS = 10.0
_SHORTEST_REFRESH = 10.0
_GONE = 410
_HOSTED = "tinker.thinkingmachines.dev"
_HOSTED_CONSOLE = "https://tinker.thinkingmachines.ai"
SDK_VERSION = "0.38.0"
"""The release of the protocol that this client speaks."""


class Connection:
    """A service and its flags, without a session.

    Args:
        base_url: of the service.
        api_key: of the caller; see `Credential`.
        headers: sent with every request.

    Attributes:
        http: sends requests.
        credential: what they carry.
        given_key: the API key that was given, if any.
        headers: sent with every request.
        config: the service's flags; defaults until `configure`.
        dynamic: its flags that change.
        budgets: how much may be under way.
    """

    def __init__(
        self, base_url: str, api_key: str | None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.credential = Credential(api_key, base_url)
        self.given_key = api_key
        self.headers = dict(headers or {})
        self.http = Http(base_url, self.credential, headers, lambda: failure_at(base_url))
        self.config = ClientConfigResponse()
        self.dynamic = ClientDynamicConfigResponse()
        self.budgets = Budgets.of(self.config)
        self._configuring: asyncio.Task[None] | None = None

    async def configured(self) -> Http:
        """The service, once it was asked for its flags."""
        if self._configuring is None or _failed(self._configuring):
            self._configuring = asyncio.create_task(self._configure())
        await asyncio.shield(self._configuring)
        return self.http

    async def refresh(self) -> None:
        """Ask again for the flags that change; a service need not have any."""
        try:
            response = await self.http.send(
                "POST", "/client/dynamic_config", json={"sdk_version": SDK_VERSION}
            )
        except APIError as error:
            _log.debug("no dynamic configuration: %s", error)
            return
        if response.status_code == httpx.codes.OK:
            self.dynamic = ClientDynamicConfigResponse.model_validate(response.json())

    def console_url(self, *path: str) -> str:
        """Where a person can look at something of the service."""
        hosted = httpx.URL(self.http.base_url).host == _HOSTED
        return "/".join([_HOSTED_CONSOLE if hosted else f"{self.http.base_url}/console", *path])

    async def _configure(self) -> None:
        body = {"sdk_version": SDK_VERSION}
        self.config = await self.http.call(
            "POST", "/client/config", ClientConfigResponse, json=body
        )
        self.budgets = Budgets.of(self.config)
        if self.config.pjwt_auth_enabled:
            self.credential.exchange(self._token)
        await self.refresh()

    async def _token(self) -> str:
        answer = await self.http.call("POST", "/auth/token", AuthTokenResponse, json={})
        return answer.jwt


class Session:
    """A session that is opened when it is first needed.

    Args:
        connection: the service.
        request: what the session is opened with.
        hooks: told of every operation.

    Attributes:
        opened: the session's id, once it is open.
        telemetry: of the session, once it is open.
    """

    def __init__(
        self, connection: Connection, request: CreateSessionRequest, hooks: Sequence[Hook]
    ) -> None:
        self.connection = connection
        self.http = connection.http
        self.hooks = tuple(hooks)
        self.telemetry: Telemetry | None = None
        self.opened: str | None = None
        self._request = request
        self._opening: asyncio.Task[str] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def joined(cls, connection: Connection, session_id: str) -> Session:
        """A session that another process opened, and keeps alive."""
        session = cls(connection, CreateSessionRequest(), ())
        session.opened = session_id
        return session

    async def again(self) -> Session:
        """Another session like this one, for when the service no longer has this one."""
        await self._stop()
        return Session(self.connection, self._request, self.hooks)

    @property
    def config(self) -> ClientConfigResponse:
        """The service's flags."""
        return self.connection.config

    def next_id(self, kind: str) -> int:
        """The next of the session's numbers for ``model``, ``sampler`` or ``custom_loss``."""
        with self._lock:
            number = self._counts.get(kind, 0)
            self._counts[kind] = number + 1
            return number

    async def id(self) -> str:
        """The session's id, opening it when that hasn't been done."""
        if self.opened is not None:
            return self.opened
        if self._opening is None or _failed(self._opening):
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def finish(self, reason: str, detail: str | None) -> None:
        """End the session, if it was opened."""
        await self._stop()
        if self._opening is None or _failed(self._opening):
            return  # never opened, or another process's
        session_id = await self.id()
        body: Mapping[str, Any] = {"reason": {"type": reason}, "detail": detail}
        await self.http.request("POST", f"/sessions/{session_id}/finish", json=body)

    async def _stop(self) -> None:
        """Do nothing more in the background, and tell what is left to tell."""
        for task in list(self._background):
            task.cancel()
        if self.telemetry is not None:
            await self.telemetry.stop()

    async def _open(self) -> str:
        await self.connection.configured()
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
        self.opened = answer.session_id
        if enabled():
            self.telemetry = Telemetry(self.http, answer.session_id)
            self.telemetry.start()
        self.in_background(self._beat(answer.session_id))
        self.in_background(self._refresh())
        return answer.session_id

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something until the session is finished; called on the client's loop."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _refresh(self) -> None:
        """Keep the flags that change up to date."""
        while True:
            interval = self.connection.dynamic.refresh_interval_sec
            await asyncio.sleep(max(interval, _SHORTEST_REFRESH))
            await self.connection.refresh()

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


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def session_request(
    user_metadata: Mapping[str, Any] | None, project_id: str | None, display_name: str | None
) -> CreateSessionRequest:
    """What a session is opened with; ``TINKER_TAGS`` gives its tags."""
    return CreateSessionRequest(
        tags=[tag for tag in os.environ.get("TINKER_TAGS", "").split(",") if tag],
        user_metadata=dict(user_metadata or {}),
        sdk_version=VERSION,
        project_id=project_id,
        display_name=display_name,
    )
