"""Session: a session with a service, its flags, its id and its heartbeat."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import httpx

from everstep._version import __version__
from everstep.client._transport import embedded_service
from everstep.client._transport.byte_budget import Budgets
from everstep.client._transport.credentials import LOCAL, Credential, service_url
from everstep.client._transport.errors import APIError, TinkerError
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.http import Http
from everstep.client._transport.request_events import Hook
from everstep.client._transport.telemetry import Telemetry, enabled
from everstep.wire import types

_log = logging.getLogger("everstep.client")
_HEARTBEAT_SECONDS = 10.0
_MIN_REFRESH_SECONDS = 10.0
_GONE = 410
_HOSTED = "tinker.thinkingmachines.dev"
_HOSTED_CONSOLE = "https://tinker.thinkingmachines.ai"
SDK_VERSION = "0.38.0"
"""Release of the official SDK whose protocol this client speaks."""


class Connection:
    """A service and its flags, without a session.

    Args:
        base_url: of the service.
        api_key: of the caller. See `Credential`.
        headers: sent with every request.
        transport: answers the requests instead of the network.

    Attributes:
        http: sends requests.
        credential: added to every request.
        given_key: the API key that was given, if any.
        headers: sent with every request.
        config: the service's flags, or defaults before `configured`.
        dynamic: the flags that may change during a session.
        budgets: bounds on the bytes in flight.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.credential = Credential(api_key, base_url)
        self.given_key = api_key
        self.headers = dict(headers or {})
        self.http = Http(
            base_url,
            self.credential,
            headers,
            lambda: embedded_service.failure_at(self.http.base_url),
            embedded_service.current_address,
            transport,
        )
        self.config = types.ClientConfigResponse()
        self.dynamic = types.ClientDynamicConfigResponse()
        self.budgets = Budgets.of(self.config)
        self._configuring: asyncio.Task[None] | None = None

    async def configured(self) -> Http:
        """Return the service's `Http`, fetching the flags first if that hasn't been done."""
        if self._configuring is None or _failed(self._configuring):
            self._configuring = asyncio.create_task(self._configure())
        await asyncio.shield(self._configuring)
        return self.http

    async def refresh(self) -> None:
        """Fetch the flags that may change. A service need not have any."""
        try:
            response = await self.http.send(
                "POST", "/client/dynamic_config", json={"sdk_version": SDK_VERSION}
            )
        except APIError as error:
            _log.debug("dynamic configuration not fetched: %s", error)
            return
        if response.status_code == httpx.codes.OK:
            self.dynamic = types.ClientDynamicConfigResponse.model_validate(response.json())

    def call(self, method: str, path: str, answer: Any, **arguments: Any) -> APIFuture[Any]:
        """Send a request and parse its response as a type. See `Http.call`."""

        async def work() -> Any:
            http = await self.configured()
            return await http.call(method, path, answer, **arguments)

        return APIFuture.of(work())

    def do(self, method: str, path: str, **arguments: Any) -> APIFuture[None]:
        """Send a request and ignore its response. See `Http.request`."""

        async def work() -> None:
            http = await self.configured()
            await http.request(method, path, **arguments)

        return APIFuture.of(work())

    def console_url(self, *path: str) -> str:
        """Return the address of a page in the service's console."""
        hosted = httpx.URL(self.http.base_url).host == _HOSTED
        return "/".join([_HOSTED_CONSOLE if hosted else f"{self.http.base_url}/console", *path])

    async def _configure(self) -> None:
        body = {"sdk_version": SDK_VERSION}
        self.config = await self.http.call(
            "POST", "/client/config", types.ClientConfigResponse, json=body
        )
        self.budgets = Budgets.of(self.config)
        if self.config.pjwt_auth_enabled:
            self.credential.use_tokens(self._fetch_token)
        await self.refresh()

    async def _fetch_token(self) -> str:
        answer = await self.http.call("POST", "/auth/token", types.AuthTokenResponse, json={})
        return answer.jwt


_connections: dict[tuple[str, str | None], Connection] = {}
_connections_lock = threading.Lock()


def shared_connection(base_url: str | None, api_key: str | None) -> Connection:
    """Return the process's connection to a service, created at the first call.

    Raises:
        TinkerError: there is no API key, or the key is malformed.
        LocalServiceError: the embedded service did not start.
    """
    url = service_url(base_url)
    if url == LOCAL:
        url = embedded_service.acquire(embedded_service.default_home(), ()).address
    with _connections_lock:
        key = (url, api_key)
        if key not in _connections:
            _connections[key] = Connection(url, api_key)
        return _connections[key]


class Session:
    """A session that is opened when it is first needed.

    Args:
        connection: the service.
        request: sent when the session is opened.
        hooks: called for every operation.

    Attributes:
        opened: the session's id, once it is open.
        telemetry: of the session, once it is open.
    """

    def __init__(
        self, connection: Connection, request: types.CreateSessionRequest, hooks: Sequence[Hook]
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
        """Join a session that another process opened and keeps alive."""
        session = cls(connection, types.CreateSessionRequest(), ())
        session.opened = session_id
        return session

    async def replacement(self) -> Session:
        """Create a session like this one, for when the service no longer has this one."""
        await self._stop()
        return Session(self.connection, self._request, self.hooks)

    def __repr__(self) -> str:
        return f"<Session {self.opened or 'not opened yet'} at {self.http.base_url}>"

    @property
    def config(self) -> types.ClientConfigResponse:
        """The service's flags."""
        return self.connection.config

    def next_id(self, kind: str) -> int:
        """Return the session's next number for a ``model``, ``sampler`` or ``custom_loss``."""
        with self._lock:
            number = self._counts.get(kind, 0)
            self._counts[kind] = number + 1
            return number

    async def id(self) -> str:
        """Return the session's id, opening the session if needed."""
        if self.opened is not None:
            return self.opened
        if self._opening is None or _failed(self._opening):
            self._opening = asyncio.create_task(self._open())
        return await asyncio.shield(self._opening)

    async def finish(self, reason: str, detail: str | None) -> None:
        """End the session, if it was opened."""
        await self._stop()
        if self._opening is None or _failed(self._opening):
            return  # never opened, or opened by another process
        session_id = await self.id()
        body: Mapping[str, Any] = {"reason": {"type": reason}, "detail": detail}
        await self.http.request("POST", f"/sessions/{session_id}/finish", json=body)

    async def _stop(self) -> None:
        """Cancel background tasks and flush telemetry."""
        for task in list(self._background):
            task.cancel()
        if self.telemetry is not None:
            await self.telemetry.stop()

    async def _open(self) -> str:
        await self.connection.configured()
        answer = await self.http.call(
            "POST",
            "/create_session",
            types.CreateSessionResponse,
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
        self.in_background(self._send_heartbeats(answer.session_id))
        self.in_background(self._refresh_flags())
        return answer.session_id

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine until the session is finished. Called on the client's event loop."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _refresh_flags(self) -> None:
        """Keep the flags that may change up to date."""
        while True:
            interval = self.connection.dynamic.refresh_interval_sec
            await asyncio.sleep(max(interval, _MIN_REFRESH_SECONDS))
            await self.connection.refresh()

    async def _send_heartbeats(self, session_id: str) -> None:
        """Send heartbeats until the session is finished."""
        body = {"session_id": session_id, "type": "session_heartbeat"}
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            try:
                response = await self.http.send(
                    "POST", "/session_heartbeat", json=body, timeout=_HEARTBEAT_SECONDS
                )
            except TinkerError as error:
                _log.debug("heartbeat failed: %s", error)
                continue
            if response.status_code == _GONE:
                return


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def session_request(
    user_metadata: Mapping[str, Any] | None, project_id: str | None, display_name: str | None
) -> types.CreateSessionRequest:
    """Build the request that opens a session. ``TINKER_TAGS`` gives its tags."""
    return types.CreateSessionRequest(
        tags=[tag for tag in os.environ.get("TINKER_TAGS", "").split(",") if tag],
        user_metadata=dict(user_metadata or {}),
        sdk_version=__version__,
        project_id=project_id,
        display_name=display_name,
    )
