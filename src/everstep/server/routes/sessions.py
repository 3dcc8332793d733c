"""Sessions: client configuration, sessions, projects, traces, telemetry."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from everstep.server.body import BodyRoute
from everstep.server.client_info import polls_and_cancels
from everstep.server.openapi import errors
from everstep.server.requests import CurrentRuntime
from everstep.server.routes.checkpoints import AccessScope, Limit, Offset
from everstep.wire import types
from everstep.wire.messages.publication import AssignProjectRequest, TraceExportResponse

router = APIRouter(tags=["sessions"], route_class=BodyRoute)


@router.post("/client/config")
async def client_config(
    message: types.ClientConfigRequest | None = None,
) -> types.ClientConfigResponse:
    """Return the flags of a client. Those of older SDKs move them onto today's endpoints."""
    enabled = polls_and_cancels(message.sdk_version if message is not None else None)
    return types.ClientConfigResponse(
        custom_loss_server_side=True,
        sample_use_retrieve_futures=enabled,
        sample_join_sampling_session=enabled,
    )


@router.post("/client/dynamic_config")
async def client_dynamic_config(
    message: types.ClientConfigRequest | None = None,
) -> types.ClientDynamicConfigResponse:
    """Return the flags that a client requests again from time to time."""
    enabled = polls_and_cancels(message.sdk_version if message is not None else None)
    return types.ClientDynamicConfigResponse(sample_cancel_enabled=enabled)


@router.get("/get_server_capabilities", responses=errors())
async def get_server_capabilities(runtime: CurrentRuntime) -> types.GetServerCapabilitiesResponse:
    """Return the models that are served."""
    await runtime.loaded()
    return runtime.model_queries.capabilities()


@router.post(
    "/create_session",
    responses=errors(400, 413),
)
async def create_session(
    message: types.CreateSessionRequest,
    runtime: CurrentRuntime,
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> types.CreateSessionResponse:
    """Create a session. A retry with the same X-Idempotency-Key gets the same one."""
    return await runtime.sessions.create(message, x_idempotency_key)


@router.post(
    "/session_heartbeat",
    responses=errors(400, 404, 410, 413),
)
async def session_heartbeat(
    message: types.SessionHeartbeatRequest, runtime: CurrentRuntime
) -> types.SessionHeartbeatResponse:
    """Record that a session's client is alive. 410 once the session is finished."""
    await runtime.sessions.heartbeat(message.session_id)
    return types.SessionHeartbeatResponse()


@router.post(
    "/sessions/{session_id}/finish",
    responses=errors(400, 404, 413),
)
async def finish_session(
    runtime: CurrentRuntime, session_id: str, message: types.FinishSessionRequest | None = None
) -> types.HealthResponse:
    """End a session. One that has ended keeps its first reason."""
    message = message or types.FinishSessionRequest()
    await runtime.sessions.finish(session_id, message.reason.type, message.detail)
    return types.HealthResponse()


@router.get("/sessions", responses=errors(400))
async def sessions(
    runtime: CurrentRuntime,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> types.ListSessionsResponse:
    """Return a page of session ids, newest first."""
    return await runtime.session_queries.sessions(limit, offset)


@router.post(
    "/sessions/search",
    responses=errors(400, 413),
)
async def search_sessions(
    message: types.SessionSearchRequest, runtime: CurrentRuntime
) -> types.SessionSearchResponse:
    """Return a page of the sessions that meet a search, newest first."""
    return await runtime.session_queries.search(message)


@router.get("/sessions/{session_id}", responses=errors(400, 404))
async def session(
    runtime: CurrentRuntime, session_id: str, access_scope: AccessScope = "owned"
) -> types.GetSessionResponse:
    """Return the runs and samplers of a session."""
    return await runtime.session_queries.session(session_id)


@router.put(
    "/sessions/{session_id}/project",
    status_code=204,
    responses=errors(400, 404, 413),
)
async def assign_project(
    message: AssignProjectRequest, runtime: CurrentRuntime, session_id: str
) -> Response:
    """Move a session, with its runs, into a project."""
    await runtime.session_queries.assign(session_id, message.project_id)
    return Response(status_code=204)


@router.get("/sessions/{session_id}/trace_export", responses=errors(404))
async def export_trace(
    request: Request, runtime: CurrentRuntime, session_id: str
) -> TraceExportResponse:
    """Export a session's time line. Repeat the request while that is pending."""
    traces = runtime.traces
    try:
        name = await traces.export(session_id)
    except OSError as error:
        text = f"The trace can't be written: {error.strerror}"
        return TraceExportResponse(status="failed", error=text)
    if name is None:
        return TraceExportResponse(status="pending")
    address = request.url_for("trace_file", name=name).include_query_params(**traces.link(name))
    return TraceExportResponse(status="ready", url=str(address))


@router.post("/telemetry", responses=errors(400, 413))
async def telemetry(message: types.TelemetrySendRequest) -> types.TelemetryResponse:
    """Accept a client's events and discard them."""
    return types.TelemetryResponse()
