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
from collections.abc import Callable
from dataclasses import asdict
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from fastapi import Depends, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from everstep.engine.prepared_pass import PreparedPass
from everstep.server.client_info import client_of
from everstep.server.direct import Handler, direct_handler
from everstep.server.offload.jobs import failures_of
from everstep.server.openapi import request_body
from everstep.server.passes import MAX_BODY_BYTES, InvalidOperation, PassForm, invalid_operation
from everstep.server.receive import Received, offloaded, parsed, read_message, receive_start
from everstep.server.requests import close_held, held_until_answered, runtime_of
from everstep.spool import SPOOLED_BYTES
from everstep.wire.base import Request as Message
from everstep.wire.base import parse
from everstep.wire.codecs.body import too_large
from everstep.wire.codecs.proto import PROTOBUF, TrainingPass
from everstep.wire.errors import InvalidRequest
from everstep.wire.messages.requests import ForwardBackwardRequest, ForwardRequest, SampleRequest
from everstep.worker.protocol.prepared_sample import PreparedSample

Body = TypeVar("Body", bound=Message)
_PROTOBUF_PASS = (
    "A ForwardBackwardRequest of the package tinker_public (everstep/wire/codecs/everstep.proto); "
    "its forward_only says whether gradients are wanted, whichever of the two routes it comes to. "
    "Newer SDKs send nothing else."
)


async def _body_of(request: Request) -> bytes:
    """Return a request's body, which two parameters of a route may read."""
    state = request.state
    if not hasattr(state, "body"):
        state.body = await read_message(request)
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
        return await parsed(request, self.model, body)

    def openapi(self) -> dict[str, Any]:
        """Describe the body, as a route's ``openapi_extra``."""
        return request_body(self.model, required=self.required)


class OperationBody(JsonBody[Body]):
    """A dependency that parses the JSON body of an operation."""

    async def __call__(self, request: Request) -> Body | None:
        """Parse the body, raising `InvalidOperation`, or `InvalidRequest` for an unknown run."""
        body = await _body_of(request)
        try:
            return await parsed(request, self.model, body)
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
        received = await receive_start(request)
        plain = received.plain(form.encoding)
        return form.decode(plain) if plain is not None else await _prepared(request, form, received)

    def openapi(self) -> dict[str, Any]:
        """Describe the body, as a route's ``openapi_extra``."""
        return request_body(self.model, protobuf=_PROTOBUF_PASS)


class SampleBody:
    """A dependency that parses a sample request from JSON, a large one in another process."""

    async def __call__(self, request: Request) -> SampleRequest | PreparedSample:
        """Parse the body, raising `InvalidRequest` for an invalid one."""
        encoding, newer = request.headers.get("content-encoding"), client_of(request).is_newer
        received = await receive_start(request)
        plain = received.plain(encoding)
        if plain is not None:
            return parse(SampleRequest, plain, newer_client=newer)
        models = await _limits(request)
        arguments = {"encoding": encoding, "newer_client": newer, "models": models}
        preparing = offloaded(
            request, received, "prepare_sample", arguments, lambda _: too_large(MAX_BODY_BYTES)
        )
        async with preparing as (facts, result):
            payload = await asyncio.to_thread(result.read)
        return PreparedSample(**{**facts, "failures": failures_of(facts)}, payload=payload)

    def openapi(self) -> dict[str, Any]:
        """Describe the body, as a route's ``openapi_extra``."""
        return request_body(SampleRequest)


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
            finally:
                await close_held(request)

        return handle


async def _prepared(request: Request, form: PassForm, received: Received) -> PreparedPass:
    """Have a large pass prepared in another process."""
    arguments = {
        "form": asdict(form),
        "models": await _limits(request),
        "refuse_stable_reinforce": runtime_of(request).settings.stable_reinforce == "refuse",
    }
    preparing = offloaded(request, received, "prepare_pass", arguments, form.too_large)
    facts, result = await held_until_answered(request).enter_async_context(preparing)
    small = result.size < SPOOLED_BYTES
    payload = await asyncio.to_thread(result.read) if small else result
    return PreparedPass(**{**facts, "failures": failures_of(facts)}, payload=payload)


async def _limits(request: Request) -> list[list[int]]:
    """Return the limits of the served models, once they are loaded."""
    runtime = runtime_of(request)
    await runtime.loaded()
    return [[each.vocab_size, each.max_context_length] for each in runtime.models]


def _bind_body(
    endpoint: Callable[..., Any], json_body: type[JsonBody[Any]]
) -> JsonBody[Any] | TrainingPassBody | SampleBody | None:
    """Make an endpoint's message parameter a dependency and return it, if there is one."""
    signature = inspect.signature(endpoint, eval_str=True)
    for parameter in signature.parameters.values():
        for mark in get_args(parameter.annotation)[1:]:
            found = getattr(mark, "dependency", None)
            if isinstance(found, JsonBody | TrainingPassBody | SampleBody):
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
