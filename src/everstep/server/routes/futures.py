"""Futures: long polls for results of operations, and cancellation of samples."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from everstep.ledger import Failure, LedgerDamaged, Operation
from everstep.runtime import Runtime, UnknownFuture
from everstep.runtime.sampling.requests import result_dropped
from everstep.server.body import BodyRoute
from everstep.server.client_info import Client, ClientInfo
from everstep.server.conversion import converted, converted_response
from everstep.server.json_results import SampleResult, TrainingPassResult
from everstep.server.openapi import errors, protobuf_content
from everstep.server.piecewise import FileResponse, PiecewiseResponse
from everstep.server.requests import CurrentRuntime, CurrentStopping, no_future
from everstep.server.stopping import Stopping
from everstep.wire import types
from everstep.wire.codecs.proto import PROTOBUF

router = APIRouter(tags=["futures"], route_class=BodyRoute)
MAX_INLINE_BYTES = 4 << 20
"""Of larger results only the size is returned, to clients that allow it."""


RESULTS = (
    TrainingPassResult
    | SampleResult
    | types.CreateModelResponse
    | types.OptimStepResponse
    | types.SaveWeightsResponse
    | types.LoadWeightsResponse
    | types.SaveWeightsForSamplerResponseInternal
    | types.SaveWeightsExternalResponseInternal
    | types.UnloadModelResponse
    | types.CreateCustomLossResponse
    | types.CompleteMetadataResponse
    | types.RequestFailedResponse
)
_PROTOBUF_RESULT = (
    "The result of a training pass (ForwardBackwardOutput) or of a sample (SampleResponse), of the "
    "package tinker_public (everstep/wire/codecs/everstep.proto), to clients whose Accept names "
    "this type."
)


@router.post(
    "/retrieve_future",
    responses={
        **errors(400, 404, 410, 413),
        200: {
            "model": RESULTS,
            "description": "The result, or its size where it is large and allow_metadata_only is "
            "set, or the failure",
            "content": {PROTOBUF: protobuf_content(_PROTOBUF_RESULT)},
        },
        408: {"model": types.TryAgainResponse, "description": "Not finished yet, try again"},
    },
    response_model=None,
)
async def retrieve_future(
    request: Request,
    message: types.FutureRetrieveRequest,
    runtime: CurrentRuntime,
    client: Client,
    stopping: CurrentStopping,
) -> Response:
    """Wait for the result of an operation. It is protobuf where that is accepted."""
    return await result_response(request, message, runtime, client, stopping)


async def result_response(
    request: Request,
    message: types.FutureRetrieveRequest,
    runtime: Runtime,
    client: ClientInfo,
    stopping: Stopping,
) -> Response:
    """Answer a long poll. Raises `Rejected` where the future or its result is not there."""
    waiting = runtime.wait(message.request_id, runtime.settings.poll_seconds)
    try:
        operation = await stopping.unless_set(waiting)
    except UnknownFuture as error:
        raise no_future(message.request_id) from error
    except LedgerDamaged as damage:
        return _damaged(damage)
    if operation is None:
        reason = await runtime.waits_for(message.request_id)
        pending = types.TryAgainResponse(
            request_id=message.request_id,
            queue_state="active" if reason is None else "paused_capacity",
            queue_state_reason=reason,
        )
        return JSONResponse(pending.model_dump(exclude_none=True), status_code=408)
    if operation.failure is not None:
        return _failure(operation.failure, client)
    try:
        return await _result(operation, message.allow_metadata_only, request, runtime)
    except LedgerDamaged as damage:
        return _damaged(damage)


@router.post(
    "/retrieve_futures",
    responses=errors(400, 404, 413),
)
async def retrieve_futures(
    message: types.FuturesRetrieveRequest, runtime: CurrentRuntime, stopping: CurrentStopping
) -> types.FuturesRetrieveResponse:
    """Wait for samples of a sampler's client that ended since a cursor.

    The results named in `retrieved_request_ids` are dropped.
    """
    found = await stopping.unless_set(runtime.batch_poll.retrieve(message))
    return found or types.FuturesRetrieveResponse(completions=[], cursor=message.prev_cursor)


@router.post(
    "/cancel_future",
    status_code=204,
    responses=errors(400, 404, 413),
)
async def cancel_future(message: types.CancelFutureRequest, runtime: CurrentRuntime) -> Response:
    """Cancel a sample, whose future then fails. A sample that has ended stays as it is."""
    try:
        await runtime.sampling.cancel(message.request_id)
    except UnknownFuture as error:
        raise no_future(message.request_id) from error
    return Response(status_code=204)


def _failure(failure: Failure, client: ClientInfo) -> Response:
    if client.reads_message_field:
        content = {"message": failure.message, "category": failure.category}
        return JSONResponse({**content, "detail": failure.message}, status_code=400)
    return _json(types.RequestFailedResponse(error=failure.message, category=failure.category))


def _damaged(damage: LedgerDamaged) -> Response:
    return _json(types.RequestFailedResponse(error=str(damage), category="server"))


async def _result(
    operation: Operation, allow_metadata_only: bool, request: Request, runtime: Runtime
) -> Response:
    if operation.retrieved:
        raise result_dropped(operation)
    logged = operation.result_at if operation.result is None else None
    if logged is not None and logged.size > MAX_INLINE_BYTES:
        if allow_metadata_only:
            return _json(types.CompleteMetadataResponse(response_payload_size=logged.size))
        response = await _logged_result(operation, logged.size, request, runtime)
        if response is not None:
            return response
    if logged is not None:
        operation = await runtime.results.filled(operation)
    body = operation.result or b""
    if allow_metadata_only and len(body) > MAX_INLINE_BYTES:
        return _json(types.CompleteMetadataResponse(response_payload_size=len(body)))
    if operation.media != "protobuf":
        return PiecewiseResponse(body, media_type="application/json")
    if PROTOBUF in request.headers.get("accept", ""):
        return PiecewiseResponse(body, media_type=PROTOBUF)
    return PiecewiseResponse(
        await converted(operation.kind, body, request), media_type="application/json"
    )


async def _logged_result(
    operation: Operation, size: int, request: Request, runtime: Runtime
) -> Response | None:
    """Answer with a result that lies in a file, without holding it in memory."""
    async with AsyncExitStack() as held:
        part = await held.enter_async_context(runtime.results.file(operation))
        if part is None:
            return None
        descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
        held.callback(os.close, descriptor)
        if operation.media == "protobuf" and PROTOBUF not in request.headers.get("accept", ""):
            kind = operation.kind
            return await converted_response(kind, descriptor, part.offset, size, request)
        media_type = PROTOBUF if operation.media == "protobuf" else "application/json"
        return FileResponse(descriptor, part.offset, size, media_type, held.pop_all())


def _json(model: Any) -> JSONResponse:
    return JSONResponse(model.model_dump(mode="json", exclude_none=True))
