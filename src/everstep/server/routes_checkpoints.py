"""Runs and checkpoints: lists, lifetimes, publication, copies, deletion."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response

from everstep.runtime import Rejected
from everstep.server.common import body_of, known_kinds, runtime_of, weights_token_of
from everstep.server.openapi import errors, takes
from everstep.wire import types
from everstep.wire.base import parse
from everstep.wire.publication import SetTtlRequest

router = APIRouter(tags=["checkpoints"])
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**63)]
AccessScope = Literal["owned", "accessible"]
"""Of whom: on a service with one owner, both mean everything."""
_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


@router.post(
    "/weights_info", openapi_extra=takes(types.WeightsInfoRequest), responses=errors(400, 404, 413)
)
async def weights_info(request: Request) -> types.WeightsInfoResponse:
    """What a checkpoint was trained with."""
    message = parse(types.WeightsInfoRequest, await body_of(request))
    token = weights_token_of(request)
    return await runtime_of(request).views.weights_info(message.tinker_path, token)


@router.get("/training_runs", responses=errors(400))
async def training_runs(
    request: Request,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: str | None = None,
) -> types.TrainingRunsResponse:
    """A page of runs, the latest used first; all, or those of a project."""
    return await runtime_of(request).views.training_runs(limit, offset, project_id)


@router.get("/training_runs/{run_id}", responses=errors(400, 404))
async def training_run(
    request: Request, run_id: str, access_scope: AccessScope = "owned"
) -> types.TrainingRun:
    """One run."""
    return await runtime_of(request).views.training_run(run_id)


@router.get("/training_runs/{run_id}/checkpoints", responses=errors(404))
async def run_checkpoints(request: Request, run_id: str) -> types.CheckpointsListResponse:
    """All checkpoints of a run."""
    return await runtime_of(request).views.run_checkpoints(run_id, known_kinds(request))


@router.get("/checkpoints", responses=errors(400))
async def checkpoints(
    request: Request, limit: Limit = 100, offset: Offset = 0
) -> types.CheckpointsListResponse:
    """A page of all checkpoints, newest first."""
    return await runtime_of(request).views.user_checkpoints(limit, offset, known_kinds(request))


@router.post(
    "/checkpoints/search",
    openapi_extra=takes(types.CheckpointSearchRequest),
    responses=errors(400, 413),
)
async def search_checkpoints(request: Request) -> types.CheckpointSearchResponse:
    """A page of the checkpoints that meet a search, newest first."""
    message = parse(types.CheckpointSearchRequest, await body_of(request))
    return await runtime_of(request).views.search_checkpoints(message, known_kinds(request))


@router.delete(_CHECKPOINT, status_code=204, responses=errors(400, 404))
async def delete_checkpoint(request: Request, run_id: str, kind: str, name: str) -> Response:
    """Delete a checkpoint for good. One that was deleted before is no error."""
    await runtime_of(request).checkpoints.delete(run_id, f"{kind}/{name}")
    return Response(status_code=204)


@router.put(
    f"{_CHECKPOINT}/ttl",
    status_code=204,
    openapi_extra=takes(SetTtlRequest),
    responses=errors(400, 404, 413),
)
async def set_ttl(request: Request, run_id: str, kind: str, name: str) -> Response:
    """Have a checkpoint expire so many seconds from now; null: never."""
    body = await body_of(request)
    message = parse(SetTtlRequest, body)
    if "ttl_seconds" not in json.loads(body):
        raise Rejected(400, "ttl_seconds is required: seconds from now, or null for no expiry.")
    lifetimes = runtime_of(request).lifetimes
    await lifetimes.set_ttl(run_id, f"{kind}/{name}", message.ttl_seconds)
    return Response(status_code=204)


@router.post(f"{_CHECKPOINT}/publish", status_code=204, responses=errors(400, 404))
async def publish(request: Request, run_id: str, kind: str, name: str) -> Response:
    """Let everyone read a checkpoint. One that is public already is no error."""
    await runtime_of(request).lifetimes.set_public(run_id, f"{kind}/{name}", True)
    return Response(status_code=204)


@router.delete(f"{_CHECKPOINT}/publish", status_code=204, responses=errors(400, 404))
async def unpublish(request: Request, run_id: str, kind: str, name: str) -> Response:
    """Let only its owner read a checkpoint. One that is private already is no error."""
    await runtime_of(request).lifetimes.set_public(run_id, f"{kind}/{name}", False)
    return Response(status_code=204)


@router.post(
    "/copy_weights", openapi_extra=takes(types.CopyWeightsRequest), responses=errors(400, 404, 413)
)
async def copy_weights(
    request: Request, x_idempotency_key: Annotated[str | None, Header()] = None
) -> types.CopyWeightsResponse:
    """Copy a checkpoint into a project; no bytes are copied.

    A retry with the same X-Idempotency-Key gets the same copy.
    """
    message = parse(types.CopyWeightsRequest, await body_of(request))
    token = weights_token_of(request, message.weights_access_token)
    path = await runtime_of(request).copies.copy(message, token, x_idempotency_key)
    return types.CopyWeightsResponse(tinker_path=path)
