"""Samplers and samples."""

from __future__ import annotations

from fastapi import APIRouter, Request

from everstep.server.common import body_of, runtime_of, weights_token_of
from everstep.server.openapi import errors, takes
from everstep.wire import types
from everstep.wire.base import parse

router = APIRouter(tags=["sampling"])


@router.post(
    "/create_sampling_session",
    openapi_extra=takes(types.CreateSamplingSessionRequest),
    responses=errors(400, 404, 413),
)
async def create_sampling_session(request: Request) -> types.CreateSamplingSessionResponse:
    """Create a sampler on a checkpoint or a base model."""
    message = parse(types.CreateSamplingSessionRequest, await body_of(request))
    runtime = runtime_of(request)
    await runtime.loaded()
    return await runtime.sessions.create_sampler(message, weights_token_of(request))


@router.get("/samplers/{sampler_id}", responses=errors(404))
async def get_sampler(request: Request, sampler_id: str) -> types.GetSamplerResponse:
    """What a sampler samples from."""
    return await runtime_of(request).sessions.sampler(sampler_id)


@router.post("/asample", openapi_extra=takes(types.SampleRequest), responses=errors(400, 404, 413))
async def asample(request: Request) -> types.UntypedAPIFuture:
    """Sample sequences, and logprobs of the prompt."""
    message = parse(types.SampleRequest, await body_of(request))
    return await runtime_of(request).submit(message)
