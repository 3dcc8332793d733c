"""Runs and checkpoints: lists, search, expiry, publication, copies, deletion."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response

from everstep.runtime import Rejected
from everstep.runtime.checkpoints.catalog import requested_checkpoint
from everstep.server.body import BodyRoute, RawBody
from everstep.server.client_info import Client
from everstep.server.openapi import errors
from everstep.server.requests import CurrentRuntime, WeightsToken
from everstep.wire import types
from everstep.wire.messages.publication import SetTtlRequest

router = APIRouter(tags=["checkpoints"], route_class=BodyRoute)
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**63)]
AccessScope = Literal["owned", "accessible"]
"""Whose objects to list. On a service with one owner, both values mean everything."""
_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


@router.post("/weights_info", responses=errors(400, 404, 413))
async def weights_info(
    message: types.WeightsInfoRequest, runtime: CurrentRuntime, weights_token: WeightsToken
) -> types.WeightsInfoResponse:
    """Return the base model and LoRA configuration of a checkpoint."""
    return await runtime.checkpoint_details.weights_info(message.tinker_path, weights_token)


@router.get("/training_runs", responses=errors(400))
async def training_runs(
    runtime: CurrentRuntime,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: str | None = None,
) -> types.TrainingRunsResponse:
    """Return a page of runs, the latest used first, of all projects or of one."""
    return await runtime.run_queries.training_runs(limit, offset, project_id)


@router.get("/training_runs/{run_id}", responses=errors(400, 404))
async def training_run(
    runtime: CurrentRuntime, run_id: str, access_scope: AccessScope = "owned"
) -> types.TrainingRun:
    """Return a run."""
    return await runtime.run_queries.training_run(run_id)


@router.get("/training_runs/{run_id}/checkpoints", responses=errors(404))
async def run_checkpoints(
    runtime: CurrentRuntime, client: Client, run_id: str
) -> types.CheckpointsListResponse:
    """Return all checkpoints of a run."""
    return await runtime.run_queries.run_checkpoints(run_id, client.readable_kinds)


@router.get("/checkpoints", responses=errors(400))
async def checkpoints(
    runtime: CurrentRuntime, client: Client, limit: Limit = 100, offset: Offset = 0
) -> types.CheckpointsListResponse:
    """Return a page of all checkpoints, newest first."""
    return await runtime.run_queries.user_checkpoints(limit, offset, client.readable_kinds)


@router.post(
    "/checkpoints/search",
    responses=errors(400, 413),
)
async def search_checkpoints(
    message: types.CheckpointSearchRequest, runtime: CurrentRuntime, client: Client
) -> types.CheckpointSearchResponse:
    """Return a page of the checkpoints that meet a search, newest first."""
    return await runtime.run_queries.search_checkpoints(message, client.readable_kinds)


@router.delete(_CHECKPOINT, status_code=204, responses=errors(400, 404))
async def delete_checkpoint(runtime: CurrentRuntime, run_id: str, kind: str, name: str) -> Response:
    """Delete a checkpoint for good. One that was deleted before is no error."""
    await runtime.catalog.delete(requested_checkpoint(run_id, f"{kind}/{name}"))
    return Response(status_code=204)


@router.put(
    f"{_CHECKPOINT}/ttl",
    status_code=204,
    responses=errors(400, 404, 413),
)
async def set_ttl(
    message: SetTtlRequest,
    body: RawBody,
    runtime: CurrentRuntime,
    run_id: str,
    kind: str,
    name: str,
) -> Response:
    """Set a checkpoint's expiry in seconds from now. Null clears it."""
    if "ttl_seconds" not in json.loads(body):  # a null is dropped from the message
        raise Rejected(400, "ttl_seconds is required: seconds from now, or null for no expiry.")
    metadata = runtime.checkpoint_metadata
    await metadata.set_ttl(run_id, f"{kind}/{name}", message.ttl_seconds)
    return Response(status_code=204)


@router.post(f"{_CHECKPOINT}/publish", status_code=204, responses=errors(400, 404))
async def publish(runtime: CurrentRuntime, run_id: str, kind: str, name: str) -> Response:
    """Let everyone read a checkpoint. One that is public already is no error."""
    await runtime.checkpoint_metadata.set_public(run_id, f"{kind}/{name}", True)
    return Response(status_code=204)


@router.delete(f"{_CHECKPOINT}/publish", status_code=204, responses=errors(400, 404))
async def unpublish(runtime: CurrentRuntime, run_id: str, kind: str, name: str) -> Response:
    """Let only its owner read a checkpoint. One that is private already is no error."""
    await runtime.checkpoint_metadata.set_public(run_id, f"{kind}/{name}", False)
    return Response(status_code=204)


@router.post("/copy_weights", responses=errors(400, 404, 413))
async def copy_weights(
    message: types.CopyWeightsRequest,
    runtime: CurrentRuntime,
    weights_token: WeightsToken,
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> types.CopyWeightsResponse:
    """Copy a checkpoint into a project without copying its bytes.

    A retry with the same X-Idempotency-Key gets the same copy.
    """
    token = message.weights_access_token or weights_token
    path = await runtime.checkpoint_copier.copy(message, token, x_idempotency_key)
    return types.CopyWeightsResponse(tinker_path=path)
