"""Sampling: samplers, samples and their event streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from everstep.integers import parse_natural
from everstep.ledger import LedgerDamaged, Operation
from everstep.logs import get_logger
from everstep.runtime import Rejected, UnknownFuture
from everstep.runtime.sampling.stream import SampleEvent
from everstep.server.body import BodyRoute, SampleBody
from everstep.server.conversion import converted
from everstep.server.errors import UNEXPECTED
from everstep.server.openapi import errors, stream_errors
from everstep.server.requests import CurrentRuntime, WeightsToken, no_future
from everstep.wire import types
from everstep.wire.errors import ErrorCategory
from everstep.worker.protocol.prepared_sample import PreparedSample

_MAX_POSITION = 2**31 - 1
_log = get_logger("everstep.server")
router = APIRouter(tags=["sampling"], route_class=BodyRoute)
Sample = Annotated[types.SampleRequest | PreparedSample, Depends(SampleBody())]


@router.post(
    "/create_sampling_session",
    responses=errors(400, 404, 413),
)
async def create_sampling_session(
    message: types.CreateSamplingSessionRequest,
    runtime: CurrentRuntime,
    weights_token: WeightsToken,
) -> types.CreateSamplingSessionResponse:
    """Create a sampler on a checkpoint or a base model."""
    await runtime.loaded()
    return await runtime.sessions.create_sampler(message, weights_token)


@router.get("/samplers/{sampler_id}", responses=errors(404))
async def get_sampler(runtime: CurrentRuntime, sampler_id: str) -> types.GetSamplerResponse:
    """Return the checkpoint or base model that a sampler samples from."""
    return await runtime.sessions.sampler(sampler_id)


@router.post(
    "/join_sampling_session",
    responses=errors(400, 404, 413),
)
async def join_sampling_session(
    message: types.JoinSamplingSessionRequest, runtime: CurrentRuntime
) -> types.JoinSamplingSessionResponse:
    """Give a client of a sampler its own number. Its sequence ids begin at 10⁹ times that."""
    return await runtime.sessions.join_sampler(message.sampling_session_id)


@router.post(
    "/asample",
    responses=errors(400, 404, 413, 429),
)
async def asample(
    message: Sample,
    runtime: CurrentRuntime,
    x_tinker_sampling_backpressure: Annotated[str | None, Header()] = None,
) -> types.UntypedAPIFuture:
    """Sample sequences, and logprobs of the prompt.

    While the service can't take another sample, clients that handle backpressure and say so
    (X-Tinker-Sampling-Backpressure) get 429 at once. Others wait first.
    """
    patient = x_tinker_sampling_backpressure is None
    return await runtime.submit(message, patient=patient)


async def _followed(
    runtime: CurrentRuntime,
    request_id: str,
    position: Annotated[
        int, Query(ge=0, le=_MAX_POSITION, description="The first position to send")
    ] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[SampleEvent]:
    if last_event_id:
        position = _read_position(last_event_id) + 1
    try:
        return await runtime.follow(request_id, position)
    except UnknownFuture as error:
        raise no_future(request_id) from error
    except LedgerDamaged as damage:
        raise Rejected(410, str(damage)) from damage


@router.get(
    "/everstep/samples/{request_id}/events",
    response_class=EventSourceResponse,
    responses=stream_errors(400, 404, 410),
)
async def sample_events(
    request: Request,
    events: Annotated[AsyncIterator[SampleEvent], Depends(_followed)],
) -> AsyncIterator[ServerSentEvent]:
    """Stream a sample while it is drawn.

    A `drawn` event for each position has the position as its id. The last event is `result` or
    `failed`. A client that lost the connection resumes with `Last-Event-ID` or `position`.
    """
    try:
        async for event in events:
            yield await _server_sent(event, request)
    except Exception as error:  # noqa: BLE001  the status is sent: only an event can report it
        _log.error("sample stream failed", error=repr(error), exc_info=error)
        failure = str(error) if isinstance(error, LedgerDamaged) else UNEXPECTED
        yield _failed(failure, ErrorCategory.SERVER)


def _read_position(last_event_id: str) -> int:
    """Return the position of the last event that a client has read."""
    position = parse_natural(last_event_id, _MAX_POSITION)
    if position is None:
        raise Rejected(
            400, f"Last-Event-ID {last_event_id[:40]!r} is not the id of an event of this stream."
        )
    return position


async def _server_sent(event: SampleEvent, request: Request) -> ServerSentEvent:
    if not isinstance(event, Operation):
        content = event.model_dump_json(exclude_none=True)
        return ServerSentEvent(event="drawn", id=str(event.position), raw_data=content)
    if event.failure is not None:
        return _failed(event.failure.message, event.failure.category)
    result = await converted(event.kind, event.result or b"", request)
    return ServerSentEvent(event="result", raw_data=result.decode())


def _failed(message: str, category: str) -> ServerSentEvent:
    return ServerSentEvent(event="failed", data={"error": message, "category": category})
