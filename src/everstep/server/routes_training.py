"""Operations on runs: each is accepted durably and answered with a future."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request

from everstep.server.common import body_of, is_near, is_tinkex, runtime_of, weights_token_of
from everstep.server.openapi import errors, takes
from everstep.wire import types
from everstep.wire.base import Model, parse
from everstep.wire.errors import BodyTooLarge, InvalidRequest
from everstep.wire.proto import PROTOBUF, TrainingPass, decode_training_pass, place_of

router = APIRouter(tags=["training"])
Future = types.UntypedAPIFuture
_LAST_SEQ_ID = 2**63 - 1
_REFUSALS = errors(400, 404, 413)
_MESSAGE = (
    "A ForwardBackwardRequest of the package tinker_public (everstep/wire/everstep.proto); its "
    "forward_only says whether gradients are wanted, whichever of the two routes it comes to. "
    "Newer SDKs send nothing else."
)


@router.post("/create_model", openapi_extra=takes(types.CreateModelRequest), responses=_REFUSALS)
async def create_model(request: Request) -> Future:
    """Create a run."""
    message = parse(types.CreateModelRequest, await body_of(request))
    return await runtime_of(request).submit(message)


@router.post("/unload_model", openapi_extra=takes(types.UnloadModelRequest), responses=_REFUSALS)
async def unload_model(request: Request) -> Future:
    """Let a run leave memory; it comes back with its next request."""
    message = parse(types.UnloadModelRequest, await body_of(request))
    return await runtime_of(request).submit(message)


@router.post("/get_info", openapi_extra=takes(types.GetInfoRequest), responses=_REFUSALS)
async def get_info(request: Request) -> types.GetInfoResponse:
    """A run's model."""
    message = parse(types.GetInfoRequest, await body_of(request))
    runtime = runtime_of(request)
    await runtime.loaded()
    return await runtime.views.model_info(message.model_id, near=is_near(request))


@router.post(
    "/forward",
    openapi_extra=takes(types.ForwardRequest, protobuf=_MESSAGE),
    responses=_REFUSALS,
)
async def forward(request: Request) -> Future:
    """Loss and logprobs, without gradients."""
    return await _training_pass(request, types.ForwardRequest, "forward")


@router.post(
    "/forward_backward",
    openapi_extra=takes(types.ForwardBackwardRequest, protobuf=_MESSAGE),
    responses=_REFUSALS,
)
async def forward_backward(request: Request) -> Future:
    """Loss, logprobs and gradients; gradients add up until optim_step."""
    return await _training_pass(request, types.ForwardBackwardRequest, "forward_backward")


@router.post("/optim_step", openapi_extra=takes(types.OptimStepRequest), responses=_REFUSALS)
async def optim_step(request: Request) -> Future:
    """One step of the optimizer."""
    return await _submit(request, types.OptimStepRequest, "optim_step")


@router.post("/save_weights", openapi_extra=takes(types.SaveWeightsRequest), responses=_REFUSALS)
async def save_weights(request: Request) -> Future:
    """Save a training checkpoint: weights, optimizer, pending gradients."""
    return await _submit(request, types.SaveWeightsRequest, "save_weights")


@router.post("/load_weights", openapi_extra=takes(types.LoadWeightsRequest), responses=_REFUSALS)
async def load_weights(request: Request) -> Future:
    """Load a checkpoint into a run, or as a new one."""
    return await _submit(request, types.LoadWeightsRequest, "load_weights")


@router.post(
    "/save_weights_for_sampler",
    openapi_extra=takes(types.SaveWeightsForSamplerRequest),
    responses=_REFUSALS,
)
async def save_weights_for_sampler(request: Request) -> Future:
    """Save weights to sample from."""
    return await _submit(request, types.SaveWeightsForSamplerRequest, "save_weights_for_sampler")


@router.post(
    "/save_weights_external",
    openapi_extra=takes(types.SaveWeightsExternalRequest),
    responses=_REFUSALS,
)
async def save_weights_external(request: Request) -> Future:
    """Save the adapter as files to download, encrypted with age where recipients are given."""
    return await _submit(request, types.SaveWeightsExternalRequest, "save_weights_external")


@router.post(
    "/create_custom_loss",
    openapi_extra=takes(types.CreateCustomLossRequest),
    responses=_REFUSALS,
)
async def create_custom_loss(request: Request) -> Future:
    """Keep a traced loss for its session's passes (`loss_fn` "custom")."""
    message = parse(types.CreateCustomLossRequest, await body_of(request))
    return await runtime_of(request).create_custom_loss(message)


async def _submit(request: Request, model: type[Model], kind: str) -> Future:
    runtime, body = runtime_of(request), await body_of(request)
    try:
        message = parse(model, body)
    except InvalidRequest as error:
        return await _refuse(request, kind, body, error)
    in_order = is_tinkex(request)
    if isinstance(message, types.LoadWeightsRequest):
        message.weights_access_token = weights_token_of(request, message.weights_access_token)
    return await runtime.submit(message, in_order=in_order)  # type: ignore[arg-type]  # requests


async def _training_pass(
    request: Request, model: type[types.ForwardRequest | types.ForwardBackwardRequest], kind: str
) -> Future:
    runtime = runtime_of(request)
    protobuf = request.headers.get("content-type", "").startswith(PROTOBUF)
    try:
        body = await body_of(request)
    except BodyTooLarge as error:
        place = place_of(error.head) if protobuf else None
        if place is None:
            raise
        return await runtime.refuse(kind, *place, str(error))
    try:
        message = decode_training_pass(body) if protobuf else _from_json(model, body)
    except InvalidRequest as error:
        return await _refuse(request, kind, body, error)
    return await runtime.submit(message, in_order=is_tinkex(request))


def _from_json(
    model: type[types.ForwardRequest | types.ForwardBackwardRequest], body: bytes
) -> TrainingPass:
    return TrainingPass.from_request(parse(model, body))


async def _refuse(request: Request, kind: str, body: bytes, error: InvalidRequest) -> Future:
    """Fail a request whose place is known in its place, so that nothing waits for it."""
    model_id, seq_id = error.model_id, error.seq_id
    if model_id is None or seq_id is None:
        model_id, seq_id = _place(body, error)
    if not 1 <= seq_id <= _LAST_SEQ_ID:
        raise error
    runtime, in_order = runtime_of(request), is_tinkex(request)
    return await runtime.refuse(kind, model_id, seq_id, str(error), in_order=in_order)


def _place(body: bytes, error: InvalidRequest) -> tuple[str, int]:
    """The run and sequence id that a JSON body names; raises the error where it doesn't."""
    try:
        content = json.loads(body)
        model_id, seq_id = content["model_id"], content["seq_id"]
    except (ValueError, KeyError, TypeError):
        raise error from None
    if not isinstance(model_id, str) or not isinstance(seq_id, int):
        raise error
    return model_id, seq_id
