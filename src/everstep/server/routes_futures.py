"""Futures: a long poll that ends with the result, or says to try again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from everstep.ledger import LedgerDamaged, Operation
from everstep.runtime import Rejected, UnknownFuture
from everstep.runtime.sampling import dropped
from everstep.server.common import body_of, is_tinkex, runtime_of, stopping_of
from everstep.server.openapi import errors, message, takes
from everstep.server.results import SampleResult, TrainingPassResult, json_result
from everstep.wire import types
from everstep.wire.base import parse
from everstep.wire.proto import PROTOBUF

router = APIRouter(tags=["futures"])
T = TypeVar("T")
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
        **errors(400, 404, 410, 413),
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


@router.post(
    "/retrieve_futures",
    openapi_extra=takes(types.FuturesRetrieveRequest),
    responses=errors(400, 404, 413),
)
async def retrieve_futures(request: Request) -> types.FuturesRetrieveResponse:
    """Which samples of a sampler's client have ended since a cursor; waits until one has.

    Results that are named in `retrieved_request_ids` are dropped.
    """
    wanted = parse(types.FuturesRetrieveRequest, await body_of(request))
    found = await _until_stop(request, runtime_of(request).completions.retrieve(wanted))
    return found or types.FuturesRetrieveResponse(completions=[], cursor=wanted.prev_cursor)


@router.post(
    "/cancel_future",
    status_code=204,
    openapi_extra=takes(types.CancelFutureRequest),
    responses=errors(400, 404, 413),
)
async def cancel_future(request: Request) -> Response:
    """Stop a sample: its future fails and says so. One that has ended stays as it is."""
    wanted = parse(types.CancelFutureRequest, await body_of(request))
    try:
        await runtime_of(request).sampling.cancel(wanted.request_id)
    except UnknownFuture as error:
        raise Rejected(404, f"There is no future {wanted.request_id} here.") from error
    return Response(status_code=204)


async def _wait(request: Request, request_id: str) -> Operation | None:
    """Wait for the operation, the end of the hold, or the service's stop."""
    runtime = runtime_of(request)
    return await _until_stop(request, runtime.wait(request_id, runtime.settings.poll_seconds))


async def _until_stop(request: Request, work: Coroutine[Any, Any, T | None]) -> T | None:
    """What a poll gives; None: the service stops."""
    result = asyncio.ensure_future(work)
    stop = asyncio.ensure_future(stopping_of(request).wait())
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
    if operation.retrieved:
        raise dropped(operation)
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
