"""What REST clients share: connections without a session."""

from __future__ import annotations

import threading
from typing import Any

from everstep.client import _local
from everstep.client._credentials import LOCAL, service_url
from everstep.client._futures import APIFuture
from everstep.client._session import Connection
from everstep.client._telemetry import Telemetry

_connections: dict[tuple[str, str | None], Connection] = {}
_lock = threading.Lock()


def shared_connection(base_url: str | None, api_key: str | None) -> Connection:
    """The process's connection to a service, kept for its life.

    Raises:
        TinkerError: there is no API key, or it can't be one.
        LocalServiceError: an embedded service was wanted and did not start.
    """
    url = service_url(base_url)
    if url == LOCAL:
        url = _local.acquire(_local.default_home(), ()).address
    with _lock:
        key = (url, api_key)
        if key not in _connections:
            _connections[key] = Connection(url, api_key)
        return _connections[key]


class Rest:
    """Base of clients that need no session.

    Args:
        holder: a connection to use; not together with the others.
        base_url: of the service; else ``TINKER_BASE_URL``.
        api_key: else ``TINKER_API_KEY``, or the stored one.
    """

    def __init__(
        self,
        _holder: Connection | None = None,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        if _holder is not None and (base_url is not None or api_key is not None):
            raise ValueError(f"{type(self).__name__}: give a connection, or base_url and api_key")
        self.holder = _holder or shared_connection(base_url, api_key)

    def get_telemetry(self) -> Telemetry | None:
        """None: telemetry belongs to sessions."""
        return None

    def _get(self, path: str, answer: Any, params: dict[str, Any] | None = None) -> APIFuture[Any]:
        return self._call("GET", path, answer, params=params)

    def _call(self, method: str, path: str, answer: Any, **arguments: Any) -> APIFuture[Any]:
        async def work() -> Any:
            http = await self.holder.configured()
            return await http.call(method, path, answer, **arguments)

        return APIFuture.of(work())

    def _do(self, method: str, path: str, **arguments: Any) -> APIFuture[None]:
        async def work() -> None:
            http = await self.holder.configured()
            await http.request(method, path, **arguments)

        return APIFuture.of(work())
