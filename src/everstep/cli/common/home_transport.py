"""Home transport: answers a client's read-only requests from a home on which no service runs.

The client is the same as of a service, and so are the queries behind the routes: only HTTP is left
out. A test compares each answer with the service's, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import httpx

from everstep._version import __version__
from everstep.client._transport.futures import submit
from everstep.client._transport.session import Connection
from everstep.json_values import encodable
from everstep.runtime.errors import Rejected
from everstep.runtime.home_reader import HomeReader
from everstep.wire import types
from everstep.wire.base import Response, parse
from everstep.wire.errors import WireError
from everstep.wire.messages.inspection import CheckpointRequest, ServiceInfoResponse

_ADDRESS = "http://localhost"
_PREFIX = "/api/v1/"
_JSON = {"content-type": "application/json"}
_RUNS_PAGE, _CHECKPOINTS_PAGE, _SESSIONS_PAGE = "20", "100", "20"


class HomeTransport(httpx.AsyncBaseTransport):
    """Answers the requests of commands that list and show, and refuses every other.

    Args:
        reader: the home.
    """

    def __init__(self, reader: HomeReader) -> None:
        self._reader = reader

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request. Raises `LedgerError` and `VaultError` where a service would fail."""
        try:
            found = await self._answer(request, await request.aread())
        except Rejected as error:
            return _refusal(error.status, error.detail)
        except WireError as error:
            return _refusal(400, str(error))
        return httpx.Response(200, headers=_JSON, content=found.model_dump_json().encode())

    async def _answer(self, request: httpx.Request, body: bytes) -> Response:
        path = request.url.raw_path.decode("ascii").partition("?")[0].removeprefix(_PREFIX)
        match request.method, *map(unquote, path.split("/")):
            case "POST", "client", "config":
                return types.ClientConfigResponse()
            case "POST", "client", "dynamic_config":
                return types.ClientDynamicConfigResponse()
            case "GET", "everstep", "info":
                return ServiceInfoResponse(version=__version__, ready=False)
            case _, "training_runs", *rest:
                return await self._runs(request, rest)
            case _, "sessions", *rest:
                return await self._sessions(request, rest, body)
            case "GET", "checkpoints":
                limit, offset = _page(request, _CHECKPOINTS_PAGE)
                return await self._reader.run_queries.user_checkpoints(limit, offset)
            case "POST", "weights_info":
                details = await self._reader.checkpoint_details()
                return await details.weights_info(parse(types.WeightsInfoRequest, body).tinker_path)
            case "POST", "everstep", "checkpoints", "details":
                details = await self._reader.checkpoint_details()
                return await details.describe(parse(CheckpointRequest, body).tinker_path)
            case "GET", "everstep", "vault", "quarantine":
                return await self._reader.quarantined()
        raise _needs_service(request)

    async def _runs(self, request: httpx.Request, path: list[str]) -> Response:
        queries = self._reader.run_queries
        match request.method, *path:
            case ["GET"]:
                limit, offset = _page(request, _RUNS_PAGE)
                return await queries.training_runs(
                    limit, offset, request.url.params.get("project_id")
                )
            case "GET", run_id:
                return await queries.training_run(run_id)
            case "GET", run_id, "checkpoints":
                return await queries.run_checkpoints(run_id)
        raise _needs_service(request)

    async def _sessions(self, request: httpx.Request, path: list[str], body: bytes) -> Response:
        queries = self._reader.session_queries
        match request.method, *path:
            case ["GET"]:
                return await queries.sessions(*_page(request, _SESSIONS_PAGE))
            case "GET", session_id:
                return await queries.session(session_id)
            case "POST", "search":
                return await queries.search(parse(types.SessionSearchRequest, body))
        raise _needs_service(request)


@contextmanager
def connect(home: Path, api_key: str | None) -> Iterator[Connection]:
    """Connect to a home's files in place of a service.

    Args:
        home: the home.
        api_key: as for a service. It is checked for its form.

    Raises:
        TinkerError: the API key is malformed.
        LedgerError: the home's ledger can't be read, or is of another release.
    """
    reader = submit(HomeReader.open(home)).result()
    try:
        yield Connection(_ADDRESS, api_key, transport=HomeTransport(reader))
    finally:
        submit(reader.close()).result()


def _page(request: httpx.Request, default: str) -> tuple[int, int]:
    params = request.url.params
    return int(params.get("limit", default)), int(params.get("offset", "0"))


def _refusal(status: int, detail: str) -> httpx.Response:
    content = json.dumps({"detail": encodable(detail)}, ensure_ascii=False, separators=(",", ":"))
    return httpx.Response(status, headers=_JSON | {"x-should-retry": "false"}, content=content)


def _needs_service(request: httpx.Request) -> Rejected:
    return Rejected(501, f"{request.method} {request.url.path} needs a service that runs.")
