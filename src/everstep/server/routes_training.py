"""Operations on runs: each is accepted durably and answered with a future."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request

from everstep.runtime import Runtime
from everstep.server.common import body_of, runtime_of
from everstep.wire import types
from everstep.wire.base import Model, parse
from everstep.wire.errors import InvalidRequest
from everstep.wire.proto import PROTOBUF, TrainingPass, decode_training_pass

router = APIRouter(tags=["training"])
Future = types.UntypedAPIFuture
_PROTOBUF_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {
            PROTOBUF: {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": {"type": "object"}},
        }
    }
}


@router.post("/create_model")
async def create_model(request: Request) -> Future:
    """Create a run."""
    message = parse(types.CreateModelRequest, await body_of(request))
    return await runtime_of(request).submit(message)


@router.post("/unload_model")
async def unload_model(request: Request) -> Future:
    """Let a run leave memory; it comes back with its next request."""
    message = parse(types.UnloadModelRequest, await body_of(request))
    return await runtime_of(request).submit(message)


@router.post("/get_info")
async def get_info(request: Request) -> types.GetInfoResponse:
    """A run's model."""
    message = parse(types.GetInfoRequest, await body_of(request))
    runtime = runtime_of(request)
    await runtime.loaded()
    return await runtime.views.model_info(message.model_id)


@router.post("/forward", openapi_extra=_PROTOBUF_BODY)
async def forward(request: Request) -> Future:
    """Loss and logprobs, without gradients."""
    return await _training_pass(request, types.ForwardRequest, "forward")


@router.post("/forward_backward", openapi_extra=_PROTOBUF_BODY)
async def forward_backward(request: Request) -> Future:
    """Loss, logprobs and gradients; gradients add up until optim_step."""
    return await _training_pass(request, types.ForwardBackwardRequest, "forward_backward")


@router.post("/optim_step")
async def optim_step(request: Request) -> Future:
    """One step of the optimizer."""
    return await _submit(request, types.OptimStepRequest, "optim_step")


@router.post("/save_weights")
async def save_weights(request: Request) -> Future:
    """Save a training checkpoint: weights, optimizer, pending gradients."""
    return await _submit(request, types.SaveWeightsRequest, "save_weights")


@router.post("/load_weights")
async def load_weights(request: Request) -> Future:
    """Load a checkpoint into a run, or as a new one."""
    return await _submit(request, types.LoadWeightsRequest, "load_weights")


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(request: Request) -> Future:
    """Save weights to sample from."""
    return await _submit(request, types.SaveWeightsForSamplerRequest, "save_weights_for_sampler")


async def _submit(request: Request, model: type[Model], kind: str) -> Future:
    runtime, body = runtime_of(request), await body_of(request)
    try:
        message = parse(model, body)
    except InvalidRequest as error:
        return await _refuse(runtime, kind, body, error)
    return await runtime.submit(message)  # type: ignore[arg-type]  # routes pass requests


async def _training_pass(
    request: Request, model: type[types.ForwardRequest | types.ForwardBackwardRequest], kind: str
) -> Future:
    runtime, body = runtime_of(request), await body_of(request)
    if request.headers.get("content-type", "").startswith(PROTOBUF):
        return await runtime.submit(decode_training_pass(body))
    try:
        message = TrainingPass.from_request(parse(model, body))
    except InvalidRequest as error:
        return await _refuse(runtime, kind, body, error)
    return await runtime.submit(message)


async def _refuse(runtime: Runtime, kind: str, body: bytes, error: InvalidRequest) -> Future:
    """Fail a request whose place is known in its place, so that nothing waits for it."""
    try:
        content = json.loads(body)
        model_id, seq_id = content["model_id"], content["seq_id"]
    except (ValueError, KeyError, TypeError):
        raise error from None
    if not isinstance(model_id, str) or not isinstance(seq_id, int) or seq_id < 1:
        raise error
    return await runtime.refuse(kind, model_id, seq_id, str(error))
