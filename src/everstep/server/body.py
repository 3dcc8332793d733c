"""Request bodies: bounded, decompressed and leniently parsed, as typed parameters of routes.

A route of a `BodyRoute` router names its body by its type, and may leave it out with a default::

    @router.post("/create_session", responses=errors(400, 413))
    async def create_session(message: CreateSessionRequest, runtime: CurrentRuntime) -> ...:

FastAPI's own body parameters don't fit: clients compress bodies, send JSON of many SDK releases
with nulls and without types, or send protobuf.
"""

# Annotations are evaluated here: FastAPI resolves none that are strings on callable objects.

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from fastapi import Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from everstep.engine.prepared_pass import ModelLimits, PreparedPass
from everstep.server.client_info import client_of
from everstep.server.direct import Handler, direct_handler
from everstep.server.offload.jobs import raise_described
from everstep.server.offload.pool import INLINE_BYTES
from everstep.server.openapi import request_body
from everstep.server.passes import MAX_BODY_BYTES, InvalidOperation, PassForm, invalid_operation
from everstep.server.requests import offload_of, runtime_of
from everstep.wire.base import Request as Message
from everstep.wire.base import parse
from everstep.wire.codecs.body import decompress, too_large
from everstep.wire.codecs.proto import PROTOBUF, TrainingPass
from everstep.wire.errors import BodyTooLarge, InvalidRequest
from everstep.wire.messages.requests import ForwardBackwardRequest, ForwardRequest

Body = TypeVar("Body", bound=Message)
Result = TypeVar("Result")
_MAX_DISCARDED_BYTES = 1 << 30
_PROTOBUF_PASS = (
    "A ForwardBackwardRequest of the package tinker_public (everstep/wire/codecs/everstep.proto); "
    "its forward_only says whether gradients are wanted, whichever of the two routes it comes to. "
    "Newer SDKs send nothing else."
)


async def read_body(request: Request) -> bytes:
    """Read a body and decompress it, keeping no more of it than the bound.

    Raises:
        BodyTooLarge: the body is larger than the bound.
        InvalidRequest: its encoding is unknown, or it is damaged.
    """
    parts: list[bytes] = []
    if await _receive(request.stream(), 0, parts.append) > MAX_BODY_BYTES:
        raise too_large(MAX_BODY_BYTES)
    body, encoding = b"".join(parts), request.headers.get("content-encoding")
    try:
        return decompress(body, encoding, INLINE_BYTES)
    except BodyTooLarge:
        return await asyncio.to_thread(decompress, body, encoding, MAX_BODY_BYTES)


async def _body_of(request: Request) -> bytes:
    """Return a request's body, which two parameters of a route may read."""
    state = request.state
    if not hasattr(state, "body"):
        state.body = await read_body(request)
    body: bytes = state.body
    return body


RawBody = Annotated[bytes, Depends(_body_of)]
"""A route's parameter for the decompressed bytes of its body."""


class JsonBody(Generic[Body]):
    """A dependency that parses a JSON body.

    Args:
        model: the type of the message.
        required: whether an empty body is an error. Otherwise it gives None.
    """

    def __init__(self, model: type[Body], *, required: bool = True) -> None:
        self.model = model
        self.required = required

    async def __call__(self, request: Request) -> Body | None:
        """Parse the body, raising `InvalidRequest` for an invalid one."""
        body = await _body_of(request)
        if not body and not self.required:
            return None
        return parse(self.model, body, newer_client=client_of(request).is_newer)

    def openapi(self) -> dict[str, Any]:
        """Describe the body, as a route's ``openapi_extra``."""
        return request_body(self.model, required=self.required)


class OperationBody(JsonBody[Body]):
    """A dependency that parses the JSON body of an operation."""

    async def __call__(self, request: Request) -> Body | None:
        """Parse the body, raising `InvalidOperation`, or `InvalidRequest` for an unknown run."""
        body = await _body_of(request)
        try:
            return parse(self.model, body, newer_client=client_of(request).is_newer)
        except InvalidRequest as error:
            raise invalid_operation(body, error) from error


class TrainingPassBody:
    """A dependency that parses a training pass from protobuf or JSON.

    Args:
        model: the type of the JSON form.
    """

    def __init__(self, model: type[ForwardRequest | ForwardBackwardRequest]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> TrainingPass | PreparedPass:
        """Parse the body, raising `InvalidOperation`, or `InvalidRequest` for an unknown run."""
        form = PassForm(
            protobuf=request.headers.get("content-type", "").startswith(PROTOBUF),
            forward=self.model is ForwardRequest,
            newer_client=client_of(request).is_newer,
            encoding=request.headers.get("content-encoding"),
        )
        parts: list[bytes] = []
        size = 0
        stream = request.stream()
        async for part in stream:
            parts.append(part)
            size += len(part)
            if size > INLINE_BYTES:
                return await _prepared(request, form, b"".join(parts), stream)
        body = b"".join(parts)
        try:
            plain = decompress(body, form.encoding, INLINE_BYTES)
        except BodyTooLarge:
            return await _prepared(request, form, body, stream)
        return form.decode(plain)

    def openapi(self) -> dict[str, Any]:
        """Describe the body, as a route's ``openapi_extra``."""
        return request_body(self.model, protobuf=_PROTOBUF_PASS)


class BodyRoute(APIRoute):
    """A route whose body is the parameter annotated with a message type."""

    json_body: type[JsonBody[Any]] = JsonBody

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        body = _bind_body(endpoint, self.json_body)
        if body is not None:
            options["openapi_extra"] = {**(options.get("openapi_extra") or {}), **body.openapi()}
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Handler:  # type: ignore[override]  # a coroutine is awaitable
        """Return the handler: a direct one where the endpoint allows it."""
        return direct_handler(self) or super().get_route_handler()


class OperationRoute(BodyRoute):
    """A route of an operation, which has the route's name.

    An invalid request whose run and sequence id are known is recorded as a failed operation and
    answered with its future, so that no later operation waits for its sequence id.
    """

    json_body = OperationBody

    def get_route_handler(self) -> Handler:  # type: ignore[override]  # a coroutine is awaitable
        """Return the handler, which records invalid operations."""
        handler, kind = super().get_route_handler(), self.name

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except InvalidOperation as error:
                in_order = client_of(request).sends_in_order
                future = await runtime_of(request).refuse(
                    kind, *error.operation, str(error), in_order=in_order
                )
                return JSONResponse(future.model_dump(mode="json"))

        return handle


async def _prepared(
    request: Request, form: PassForm, start: bytes, rest: AsyncIterator[bytes]
) -> PreparedPass:
    """Have a large pass prepared in another process.

    Args:
        request: the request.
        form: of its body.
        start: the body's first bytes.
        rest: the others, which were not read yet.
    """
    runtime = runtime_of(request)
    await runtime.loaded()
    arguments = {
        "form": asdict(form),
        "models": [[each.vocab_size, each.max_context_length] for each in runtime.models],
        "refuse_stable_reinforce": runtime.settings.stable_reinforce == "refuse",
    }
    offload = offload_of(request)
    async with offload.spool() as spool:
        spool.write(start)
        if await _receive(rest, len(start), spool.write) > MAX_BODY_BYTES:
            raise form.too_large(start)
        facts, payload = await offload.run("prepare_pass", arguments, spool)
    if "error" in facts:
        raise_described(facts["error"])
    failures = {ModelLimits(*limits): text for *limits, text in facts.pop("failures")}
    return PreparedPass(**facts, payload=payload, failures=failures)


async def _receive(stream: AsyncIterator[bytes], size: int, write: Callable[[bytes], None]) -> int:
    """Receive a body, keeping no more of it than the bound, and return its size.

    Bytes beyond the bound are read and discarded, up to another bound: many clients look for an
    answer only once they have sent everything.

    Args:
        stream: the body's parts.
        size: of what was received before.
        write: keeps a part.
    """
    async for part in stream:
        size += len(part)
        if size <= MAX_BODY_BYTES:
            write(part)
        elif size > _MAX_DISCARDED_BYTES:
            break
    return size


def _bind_body(
    endpoint: Callable[..., Any], json_body: type[JsonBody[Any]]
) -> JsonBody[Any] | TrainingPassBody | None:
    """Make an endpoint's message parameter a dependency and return it, if there is one."""
    signature = inspect.signature(endpoint, eval_str=True)
    for parameter in signature.parameters.values():
        for mark in get_args(parameter.annotation)[1:]:
            found = getattr(mark, "dependency", None)
            if isinstance(found, JsonBody | TrainingPassBody):
                return found
        model = _message_type(parameter.annotation)
        if model is not None:
            body = json_body(model, required=parameter.default is parameter.empty)
            bound = parameter.replace(
                annotation=Annotated[parameter.annotation, Depends(body)], default=parameter.empty
            )
            parameters = {**signature.parameters, parameter.name: bound}
            endpoint.__signature__ = signature.replace(  # type: ignore[attr-defined]
                parameters=list(parameters.values())
            )
            return body
    return None


def _message_type(annotation: Any) -> type[Message] | None:
    """Return the message type of a parameter ``Message`` or ``Message | None``."""
    if get_origin(annotation) is UnionType and NoneType in get_args(annotation):
        annotation = get_args(annotation)[0]
    is_message = isinstance(annotation, type) and issubclass(annotation, Message)
    return annotation if is_message else None
