"""Futures: a long poll that ends with the result, or says to try again."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from everstep.ledger import LedgerDamaged, Operation
from everstep.runtime import Rejected, UnknownFuture
from everstep.server.common import body_of, is_tinkex, runtime_of, stopping_of
from everstep.server.openapi import errors, message, takes
from everstep.server.results import SampleResult, TrainingPassResult, json_result
from everstep.wire import types
from everstep.wire.base import parse
from everstep.wire.proto import PROTOBUF

router = APIRouter(tags=["futures"])
INLINE_BYTES = 4 << 20
"""Larger results are announced by their size first, to clients that allow it."""


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
    "package tinker_public (everstep/wire/everstep.proto), to clients whose Accept names this type."
)


@router.post(
    "/retrieve_future",
    openapi_extra=takes(types.FutureRetrieveRequest),
    responses={
        **errors(400, 404, 413),
        200: {
            "model": RESULTS,
            "description": "The result; its size, where it is large and allow_metadata_only is "
            "set; or the failure",
            "content": {PROTOBUF: message(_PROTOBUF_RESULT)},
        },
        408: {"model": types.TryAgainResponse, "description": "Not finished yet; ask again"},
    },
    response_model=None,
)
async def retrieve_future(request: Request) -> Response:
    """The result of an operation; protobuf where that is accepted."""
    wanted = parse(types.FutureRetrieveRequest, await body_of(request))
    try:
        operation = await _wait(request, wanted.request_id)
    except UnknownFuture as error:
        raise Rejected(404, f"There is no future {wanted.request_id} here.") from error
    except LedgerDamaged as damage:
        return _json(types.RequestFailedResponse(error=str(damage), category="server"))
    if operation is None:
        reason = await runtime_of(request).waits_for(wanted.request_id)
        answer = types.TryAgainResponse(
            request_id=wanted.request_id,
            queue_state="active" if reason is None else "paused_capacity",
            queue_state_reason=reason,
        )
        return JSONResponse(answer.model_dump(exclude_none=True), status_code=408)
    return _answer(operation, request, wanted.allow_metadata_only)


async def _wait(request: Request, request_id: str) -> Operation | None:
    """Wait for the operation, the end of the hold, or the service's stop."""
    stopping = stopping_of(request)
    runtime = runtime_of(request)
    result = asyncio.ensure_future(runtime.wait(request_id, runtime.settings.poll_seconds))
    stop = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait([result, stop], return_when=asyncio.FIRST_COMPLETED)
        return await result if result.done() else None
    finally:
        result.cancel()
        stop.cancel()


def _answer(operation: Operation, request: Request, allow_metadata_only: bool) -> Response:
    if operation.failure is not None:
        failure = operation.failure
        if is_tinkex(request):
            refusal = {"message": failure.message, "category": failure.category}
            return JSONResponse({**refusal, "detail": failure.message}, status_code=400)
        return _json(types.RequestFailedResponse(error=failure.message, category=failure.category))
    body = operation.result or b""
    if allow_metadata_only and len(body) > INLINE_BYTES:
        return _json(types.CompleteMetadataResponse(response_payload_size=len(body)))
    if operation.media != "protobuf":
        return Response(body, media_type="application/json")
    if PROTOBUF in request.headers.get("accept", ""):
        return Response(body, media_type=PROTOBUF)
    return JSONResponse(json_result(operation.kind, body))


def _json(model: Any) -> JSONResponse:
    return JSONResponse(model.model_dump(mode="json", exclude_none=True))
