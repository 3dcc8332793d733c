"""A proxy in front of a real service that breaks one promise or several."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from everstep.server.serve import listen
from everstep.wire.codecs.arrays import pb
from everstep.wire.codecs.proto import PROTOBUF

PREFIX = "/api/v1"
_FORWARDED = (
    "user-agent",
    "x-stainless-",
    "x-tinker-",
    "x-idempotency-key",
    "content-encoding",
)


@dataclass(frozen=True)
class Call:
    """A request to the service. ``path`` is below /api/v1, as it was sent.

    ``others`` are headers about the client and its request.
    """

    method: str
    path: str
    body: bytes
    content_type: str
    accept: str
    key: str
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def json(self) -> dict[str, Any]:
        """Its body, if it is JSON."""
        return json.loads(self.body) if self.body and "json" in self.content_type else {}

    @property
    def training_pass(self) -> Any:
        """Its body as a ForwardBackwardRequest, or None if it isn't one."""
        if not self.content_type.startswith(PROTOBUF):
            return None
        message = pb.ForwardBackwardRequest()
        message.ParseFromString(self.body)
        return message

    @property
    def operation(self) -> tuple[str, int] | None:
        """Run and sequence id of a training operation."""
        message = self.training_pass
        if message is not None:
            return message.model_id, message.seq_id
        body = self.json
        return (body["model_id"], body["seq_id"]) if {"model_id", "seq_id"} <= set(body) else None

    def with_json(self, **changes: Any) -> Call:
        """Return the call with fields changed. None removes one."""
        content = {k: v for k, v in {**self.json, **changes}.items() if v is not None}
        return replace(self, body=json.dumps(content).encode(), content_type="application/json")

    def with_seq_id(self, seq_id: int) -> Call:
        """Return the call with another sequence id."""
        message = self.training_pass
        if message is None:
            return self.with_json(seq_id=seq_id)
        message.seq_id = seq_id
        return replace(self, body=message.SerializeToString())


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"

    @property
    def json(self) -> dict[str, Any]:
        """Its body, if it is JSON."""
        return json.loads(self.body) if self.body and "json" in self.content_type else {}


def answer(status: int, **content: Any) -> Answer:
    """Return a JSON response."""
    return Answer(status, json.dumps(content).encode())


def failed(text: str) -> Answer:
    """Return the response of a failed future."""
    return answer(200, error=text, category="user")


Forward = Callable[[Call], Awaitable[Answer]]
Break = Callable[[Call, Forward], Awaitable[Answer]]


class Recorder:
    """Breaks nothing, and records the requests."""

    def __init__(self) -> None:
        self.seen: list[Call] = []

    async def __call__(self, call: Call, forward: Forward) -> Answer:
        self.seen.append(call)
        return await forward(call)

    def of(self, path: str) -> list[Call]:
        return [call for call in self.seen if call.path == path]


class Proxy:
    """Runs in a thread until the context ends.

    Args:
        upstream: the service's address.
        breaks: its faults. The first one sees a request first.
    """

    def __init__(self, upstream: str, *breaks: Break) -> None:
        self._upstream = upstream + PREFIX
        self._breaks = breaks
        self._socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        methods = ["GET", "POST", "PUT", "DELETE"]
        app = Starlette(
            routes=[Route("/{rest:path}", self._handle, methods=methods)], lifespan=self._lifespan
        )
        config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()
        assert not self._thread.is_alive()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=60, verify=False, trust_env=False) as self._http:
            yield

    async def _handle(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode().removeprefix(PREFIX)
        if request.url.query:
            path += f"?{request.url.query}"
        headers = request.headers
        call = Call(
            request.method,
            path,
            await request.body(),
            headers.get("content-type", ""),
            headers.get("accept", ""),
            headers.get("x-api-key", ""),
            {name: value for name, value in headers.items() if name.startswith(_FORWARDED)},
        )
        forward: Forward = self._send
        for each in reversed(self._breaks):
            forward = _through(each, forward)
        got = await forward(call)
        return Response(got.body, got.status, media_type=got.content_type)

    async def _send(self, call: Call) -> Answer:
        headers = {**call.others, "X-API-Key": call.key, "Accept": call.accept}
        if call.content_type:
            headers["Content-Type"] = call.content_type
        got = await self._http.request(
            call.method, self._upstream + call.path, content=call.body, headers=headers
        )
        return Answer(got.status_code, got.content, got.headers.get("content-type", ""))


def _through(each: Break, forward: Forward) -> Forward:
    async def step(call: Call) -> Answer:
        return await each(call, forward)

    return step
