"""Samplers and samples."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from everstep.ledger import LedgerDamaged, Operation
from everstep.runtime import Rejected, UnknownFuture
from everstep.runtime.followers import SampleEvent
from everstep.server.common import body_of, runtime_of, weights_token_of
from everstep.server.openapi import errors, stream_errors, takes
from everstep.server.results import json_result
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


@router.post(
    "/join_sampling_session",
    openapi_extra=takes(types.JoinSamplingSessionRequest),
    responses=errors(400, 404, 413),
)
async def join_sampling_session(request: Request) -> types.JoinSamplingSessionResponse:
    """Give a client of a sampler a number of its own; its sequence ids begin at 10⁹ times that."""
    message = parse(types.JoinSamplingSessionRequest, await body_of(request))
    return await runtime_of(request).sessions.join_sampler(message.sampling_session_id)


@router.post(
    "/asample",
    openapi_extra=takes(types.SampleRequest),
    responses=errors(400, 404, 413, 429),
)
async def asample(
    request: Request, x_tinker_sampling_backpressure: Annotated[str | None, Header()] = None
) -> types.UntypedAPIFuture:
    """Sample sequences, and logprobs of the prompt.

    While the service has no place for another sample, clients that know what to do then and say so
    (X-Tinker-Sampling-Backpressure) are refused with 429 at once; others wait first.
    """
    message = parse(types.SampleRequest, await body_of(request))
    patient = x_tinker_sampling_backpressure is None
    return await runtime_of(request).submit(message, patient=patient)


async def _followed(
    request: Request,
    request_id: str,
    position: Annotated[int, Query(ge=0, description="the first position that is wanted")] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[SampleEvent]:
    if last_event_id is not None and last_event_id.isascii() and last_event_id.isdecimal():
        position = int(last_event_id) + 1
    try:
        return await runtime_of(request).follow(request_id, position)
    except UnknownFuture as error:
        raise Rejected(404, f"There is no future {request_id} here.") from error
    except LedgerDamaged as damage:
        raise Rejected(410, str(damage)) from damage


@router.get(
    "/everstep/samples/{request_id}/events",
    response_class=EventSourceResponse,
    responses=stream_errors(400, 404, 410),
)
async def sample_events(
    events: Annotated[AsyncIterator[SampleEvent], Depends(_followed)],
) -> AsyncIterator[ServerSentEvent]:
    """A sample as it is drawn.

    Events: `drawn`, one a position, whose id is the position; then `result`, or `failed`. A client
    that lost the connection goes on with `Last-Event-ID`, or with `position`.
    """
    async for event in events:
        yield _sent(event)


def _sent(event: SampleEvent) -> ServerSentEvent:
    if not isinstance(event, Operation):
        content = event.model_dump_json(exclude_none=True)
        return ServerSentEvent(event="drawn", id=str(event.position), raw_data=content)
    if event.failure is not None:
        failure = {"error": event.failure.message, "category": event.failure.category}
        return ServerSentEvent(event="failed", data=failure)
    return ServerSentEvent(event="result", data=json_result(event.kind, event.result or b""))
