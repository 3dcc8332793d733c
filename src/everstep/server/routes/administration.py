"""Administration: audit log, storage use, and refusals of hosted-only operations."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from everstep.runtime import Rejected
from everstep.server.openapi import errors
from everstep.server.requests import CurrentRuntime
from everstep.wire import types

router = APIRouter(tags=["administration"])
EventType = Literal["all", "checkpoints", "projects", "teams", "organizations"]
_NO_KEYS = (
    "This service issues no API keys and keeps none: set TINKER_API_KEY to any text that begins "
    "with 'tml-', and TINKER_BASE_URL to this service's address."
)


@router.get("/audit", responses=errors(400))
async def audit_log(
    runtime: CurrentRuntime,
    event_type: EventType = "all",
    day: Annotated[date | None, Query(lt=date.max)] = None,
    limit: Annotated[int | None, Query(ge=1, le=10_000)] = None,
    cursor: Annotated[int, Query(ge=0, lt=2**63)] = 0,
) -> types.AuditLogResponse:
    """Return the audit log of a day, in order. `limit` and `cursor` are extensions of Everstep."""
    return await runtime.audit_queries.audit_log(event_type, day, limit=limit, cursor=cursor)


@router.get("/billing/usage/checkpoints/current", responses=errors())
async def checkpoint_storage(
    runtime: CurrentRuntime, project_id: str | None = None
) -> types.CurrentCheckpointStorageUsageResponse:
    """Return the storage use of checkpoints by project."""
    return await runtime.audit_queries.storage(project_id)


@router.get("/billing/usage/events", responses=errors(404))
async def billing_usage() -> types.BillingUsageResponse:
    """Answer that nothing is billed here."""
    raise Rejected(
        404,
        "This is a self-hosted service: nothing is billed, so there is no billing usage. The "
        "storage use of checkpoints is at /billing/usage/checkpoints/current.",
    )


@router.post(
    "/auth/token",
    responses=errors(404),
)
async def auth_token() -> types.AuthTokenResponse:
    """Answer that API keys are not exchanged for tokens here."""
    raise Rejected(
        404, "This service exchanges no API keys for tokens: send the key itself (X-API-Key)."
    )


@router.post("/external_weights_upload_start", responses=errors(404))
@router.post("/external_weights_upload_finish", responses=errors(404))
async def external_weights_upload() -> types.ErrorResponse:
    """Answer that adapters are imported with one request, not uploaded file by file."""
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
