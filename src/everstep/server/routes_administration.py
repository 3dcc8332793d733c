"""What administrators ask: audit log and storage; and what only a hosted service can answer."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request

from everstep.runtime import Rejected
from everstep.server.common import runtime_of
from everstep.server.openapi import errors
from everstep.wire import types

router = APIRouter(tags=["administration"])
EventType = Literal["all", "checkpoints", "projects", "teams", "organizations"]
_NO_KEYS = (
    "This service issues no API keys and keeps none: set TINKER_API_KEY to any text that begins "
    "with 'tml-', and TINKER_BASE_URL to this service's address."
)


@router.get("/audit", responses=errors(400))
async def audit_log(
    request: Request,
    event_type: EventType = "all",
    day: Annotated[date | None, Query(lt=date.max)] = None,
    limit: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    cursor: Annotated[int, Query(ge=0, lt=2**63)] = 0,
) -> types.AuditLogResponse:
    """What was done in a day, in order; `limit` and `cursor` are ours."""
    administration = runtime_of(request).administration
    return await administration.audit_log(event_type, day, limit=limit, cursor=cursor)


@router.get("/billing/usage/checkpoints/current", responses=errors())
async def checkpoint_storage(
    request: Request, project_id: str | None = None
) -> types.CurrentCheckpointStorageUsageResponse:
    """What checkpoints take now, by project."""
    return await runtime_of(request).administration.storage(project_id)


@router.get("/billing/usage/events", responses=errors(404))
async def billing_usage() -> types.BillingUsageResponse:
    """Nothing is billed here."""
    raise Rejected(
        404,
        "This is a self-hosted service: nothing is billed, so there is no billing usage. What "
        "checkpoints take is at /billing/usage/checkpoints/current.",
    )


@router.post(
    "/auth/token",
    responses=errors(404),
)
async def auth_token() -> types.AuthTokenResponse:
    """No tokens stand for API keys here."""
    raise Rejected(
        404, "This service exchanges no API keys for tokens: send the key itself (X-API-Key)."
    )


@router.post("/external_weights_upload_start", responses=errors(404))
@router.post("/external_weights_upload_finish", responses=errors(404))
async def external_weights_upload() -> types.ErrorResponse:
    """Adapters from elsewhere are imported here, not uploaded file by file."""
    raise Rejected(
        404,
        "This service takes no uploads file by file: `everstep checkpoint import` brings an "
        "adapter in with one request (/everstep/checkpoints/import).",
    )


@router.get("/auth/apikey/me", responses=errors(404))
async def own_api_key() -> types.ErrorResponse:
    """API keys are not issued here."""
    raise Rejected(404, _NO_KEYS)


@router.delete("/auth/apikey/me", responses=errors(404))
async def delete_own_api_key() -> types.ErrorResponse:
    """API keys are not issued here."""
    raise Rejected(404, _NO_KEYS)
