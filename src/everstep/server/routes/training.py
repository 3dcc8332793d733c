"""Training: operations on runs, each accepted durably and answered with a future."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from everstep.engine.prepared_pass import PreparedPass
from everstep.runtime.admission.accept import Request as Operation
from everstep.server.body import BodyRoute, TrainingPassBody
from everstep.server.client_info import Client, client_of
from everstep.server.openapi import errors
from everstep.server.requests import CurrentRuntime, WeightsToken, runtime_of
from everstep.server.routes.followed import FollowedRoute
from everstep.wire import types
from everstep.wire.codecs.proto import TrainingPass

router = APIRouter(tags=["training"], route_class=BodyRoute)
operations = APIRouter(tags=["training"], route_class=FollowedRoute)
"""Operations in the order of a run's sequence ids."""
Future = types.UntypedAPIFuture
ForwardPass = Annotated[
    TrainingPass | PreparedPass, Depends(TrainingPassBody(types.ForwardRequest))
]
ForwardBackwardPass = Annotated[
    TrainingPass | PreparedPass, Depends(TrainingPassBody(types.ForwardBackwardRequest))
]


async def _submit_of(request: Request) -> Callable[[Operation], Awaitable[Future]]:
    """Return the function that submits a run's operation, for the client that sent it."""
    return partial(runtime_of(request).submit, in_order=client_of(request).sends_in_order)


Submit = Annotated[Callable[[Operation], Awaitable[Future]], Depends(_submit_of)]
_ERRORS = errors(400, 404, 413)
_PASS_ERRORS = errors(400, 404, 413, 429)


@router.post("/create_model", responses=_ERRORS)
async def create_model(message: types.CreateModelRequest, runtime: CurrentRuntime) -> Future:
    """Create a run."""
    return await runtime.submit(message)


@router.post("/unload_model", responses=_ERRORS)
async def unload_model(message: types.UnloadModelRequest, runtime: CurrentRuntime) -> Future:
    """Evict a run from memory. Its next request brings it back."""
    return await runtime.submit(message)


@router.post("/get_info", responses=_ERRORS)
async def get_info(
    message: types.GetInfoRequest, runtime: CurrentRuntime, client: Client
) -> types.GetInfoResponse:
    """Return a run's model."""
    await runtime.loaded()
    return await runtime.model_queries.model_info(message.model_id, near=client.is_local)


@operations.post("/forward", responses=_PASS_ERRORS)
async def forward(submit: Submit, message: ForwardPass) -> Future:
    """Compute loss and logprobs, without gradients."""
    return await submit(message)


@operations.post("/forward_backward", responses=_PASS_ERRORS)
async def forward_backward(submit: Submit, message: ForwardBackwardPass) -> Future:
    """Compute loss, logprobs and gradients, which add up until optim_step."""
    return await submit(message)


@operations.post("/optim_step", responses=_ERRORS)
async def optim_step(submit: Submit, message: types.OptimStepRequest) -> Future:
    """Apply the accumulated gradients in one optimizer step."""
    return await submit(message)


@operations.post("/save_weights", responses=_ERRORS)
async def save_weights(submit: Submit, message: types.SaveWeightsRequest) -> Future:
    """Save a training checkpoint: weights, optimizer, pending gradients."""
    return await submit(message)


@operations.post("/load_weights", responses=_ERRORS)
async def load_weights(
    submit: Submit, message: types.LoadWeightsRequest, weights_token: WeightsToken
) -> Future:
    """Load a checkpoint into a run, or as a new one."""
    message.weights_access_token = message.weights_access_token or weights_token
    return await submit(message)


@operations.post("/save_weights_for_sampler", responses=_ERRORS)
async def save_weights_for_sampler(
    submit: Submit, message: types.SaveWeightsForSamplerRequest
) -> Future:
    """Save weights to sample from."""
    return await submit(message)


@operations.post("/save_weights_external", responses=_ERRORS)
async def save_weights_external(
    submit: Submit, message: types.SaveWeightsExternalRequest
) -> Future:
    """Save the adapter as files to download, encrypted with age where recipients are given."""
    return await submit(message)


@router.post("/create_custom_loss", responses=_ERRORS)
async def create_custom_loss(
    message: types.CreateCustomLossRequest, runtime: CurrentRuntime
) -> Future:
    """Store a traced loss for the passes of its session (`loss_fn` "custom")."""
    return await runtime.create_custom_loss(message)
