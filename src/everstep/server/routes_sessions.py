"""Sessions, configuration, telemetry."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from everstep.server.common import body_of, release_of, runtime_of
from everstep.server.openapi import errors, takes
from everstep.server.routes_checkpoints import AccessScope, Limit, Offset
from everstep.wire import types
from everstep.wire.base import parse
from everstep.wire.publication import AssignProjectRequest, TraceExportResponse

router = APIRouter(tags=["sessions"])


_FIRST_THAT_POLLS_AND_CANCELS = (0, 34)
"""The official SDK was tried with these flags from this release on."""


async def _polls_and_cancels(request: Request) -> bool:
    """Whether a client may poll for many samples at once, join samplers and cancel samples."""
    body = await body_of(request)
    release = release_of(parse(types.ClientConfigRequest, body).sdk_version if body else None)
    return release is not None and release >= _FIRST_THAT_POLLS_AND_CANCELS


@router.post("/client/config", openapi_extra=takes(types.ClientConfigRequest, empty=True))
async def client_config(request: Request) -> types.ClientConfigResponse:
    """Flags for a client; those that older SDKs know move them onto today's endpoints."""
    tried = await _polls_and_cancels(request)
    return types.ClientConfigResponse(
        custom_loss_server_side=True,
        sample_use_retrieve_futures=tried,
        sample_join_sampling_session=tried,
    )


@router.post("/client/dynamic_config", openapi_extra=takes(types.ClientConfigRequest, empty=True))
async def client_dynamic_config(request: Request) -> types.ClientDynamicConfigResponse:
    """Flags that a client asks for again from time to time."""
    return types.ClientDynamicConfigResponse(
        sample_cancel_enabled=await _polls_and_cancels(request)
    )


@router.get("/get_server_capabilities", responses=errors())
async def get_server_capabilities(request: Request) -> types.GetServerCapabilitiesResponse:
    """The models that are served."""
    runtime = runtime_of(request)
    await runtime.loaded()
    return runtime.views.capabilities()


@router.post(
    "/create_session",
    openapi_extra=takes(types.CreateSessionRequest),
    responses=errors(400, 413),
)
async def create_session(
    request: Request, x_idempotency_key: Annotated[str | None, Header()] = None
) -> types.CreateSessionResponse:
    """Open a session; a retry with the same X-Idempotency-Key gets the same one."""
    message = parse(types.CreateSessionRequest, await body_of(request))
    return await runtime_of(request).sessions.create(message, x_idempotency_key)


@router.post(
    "/session_heartbeat",
    openapi_extra=takes(types.SessionHeartbeatRequest),
    responses=errors(400, 404, 410, 413),
)
async def session_heartbeat(request: Request) -> types.SessionHeartbeatResponse:
    """Note that a session's client is alive; 410 once the session is finished."""
    message = parse(types.SessionHeartbeatRequest, await body_of(request))
    await runtime_of(request).sessions.heartbeat(message.session_id)
    return types.SessionHeartbeatResponse()


@router.post(
    "/sessions/{session_id}/finish",
    openapi_extra=takes(types.FinishSessionRequest, empty=True),
    responses=errors(400, 404, 413),
)
async def finish_session(request: Request, session_id: str) -> types.HealthResponse:
    """End a session; its first end counts."""
    message = parse(types.FinishSessionRequest, await body_of(request) or b"{}")
    await runtime_of(request).sessions.finish(session_id, message.reason.type, message.detail)
    return types.HealthResponse()


@router.get("/sessions", responses=errors(400))
async def sessions(
    request: Request,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> types.ListSessionsResponse:
    """A page of session ids, newest first."""
    return await runtime_of(request).session_views.sessions(limit, offset)


@router.post(
    "/sessions/search",
    openapi_extra=takes(types.SessionSearchRequest),
    responses=errors(400, 413),
)
async def search_sessions(request: Request) -> types.SessionSearchResponse:
    """A page of the sessions that meet a search, newest first."""
    message = parse(types.SessionSearchRequest, await body_of(request))
    return await runtime_of(request).session_views.search(message)


@router.get("/sessions/{session_id}", responses=errors(400, 404))
async def session(
    request: Request, session_id: str, access_scope: AccessScope = "owned"
) -> types.GetSessionResponse:
    """A session's runs and samplers."""
    return await runtime_of(request).session_views.session(session_id)


@router.put(
    "/sessions/{session_id}/project",
    status_code=204,
    openapi_extra=takes(AssignProjectRequest),
    responses=errors(400, 404, 413),
)
async def assign_project(request: Request, session_id: str) -> Response:
    """Move a session, with its runs, into a project."""
    message = parse(AssignProjectRequest, await body_of(request))
    await runtime_of(request).session_views.assign(session_id, message.project_id)
    return Response(status_code=204)


@router.get("/sessions/{session_id}/trace_export", responses=errors(404))
async def export_trace(request: Request, session_id: str) -> TraceExportResponse:
    """Draw a session's time line; ask again while that is pending."""
    traces = runtime_of(request).traces
    try:
        name = await traces.export(session_id)
    except OSError as error:
        return TraceExportResponse(status="failed", error=f"It can't be written: {error.strerror}")
    if name is None:
        return TraceExportResponse(status="pending")
    address = request.url_for("trace_file", name=name).include_query_params(**traces.link(name))
    return TraceExportResponse(status="ready", url=str(address))


@router.post(
    "/telemetry", openapi_extra=takes(types.TelemetrySendRequest), responses=errors(400, 413)
)
async def telemetry(request: Request) -> types.TelemetryResponse:
    """Take a client's events; they are not kept."""
    parse(types.TelemetrySendRequest, await body_of(request))
    return types.TelemetryResponse()
