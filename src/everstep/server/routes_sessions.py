"""Sessions, configuration, telemetry."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request

from everstep.server.common import body_of, runtime_of
from everstep.server.openapi import errors, takes
from everstep.wire import types
from everstep.wire.base import parse

router = APIRouter(tags=["sessions"])


@router.post("/client/config", openapi_extra=takes(types.ClientConfigRequest, empty=True))
async def client_config(request: Request) -> types.ClientConfigResponse:
    """Flags for a client; those that older SDKs know move them onto today's endpoints."""
    return types.ClientConfigResponse(custom_loss_server_side=True)


@router.post("/client/dynamic_config", openapi_extra=takes(types.ClientConfigRequest, empty=True))
async def client_dynamic_config(request: Request) -> types.ClientDynamicConfigResponse:
    """Flags that a client asks for again from time to time."""
    return types.ClientDynamicConfigResponse()


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


@router.post(
    "/telemetry", openapi_extra=takes(types.TelemetrySendRequest), responses=errors(400, 413)
)
async def telemetry(request: Request) -> types.TelemetryResponse:
    """Take a client's events; they are not kept."""
    parse(types.TelemetrySendRequest, await body_of(request))
    return types.TelemetryResponse()
