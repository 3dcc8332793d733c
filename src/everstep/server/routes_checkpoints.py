"""Runs and checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from everstep.server.common import body_of, runtime_of
from everstep.server.openapi import errors, takes
from everstep.wire import types
from everstep.wire.base import parse

router = APIRouter(tags=["checkpoints"])
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]


@router.post(
    "/weights_info", openapi_extra=takes(types.WeightsInfoRequest), responses=errors(400, 404, 413)
)
async def weights_info(request: Request) -> types.WeightsInfoResponse:
    """What a checkpoint was trained with."""
    message = parse(types.WeightsInfoRequest, await body_of(request))
    return await runtime_of(request).views.weights_info(message.tinker_path)


@router.get("/training_runs", responses=errors(400))
async def training_runs(
    request: Request, limit: Limit = 20, offset: Offset = 0
) -> types.TrainingRunsResponse:
    """A page of runs, the latest used first."""
    return await runtime_of(request).views.training_runs(limit, offset)


@router.get("/training_runs/{run_id}", responses=errors(404))
async def training_run(request: Request, run_id: str) -> types.TrainingRun:
    """One run."""
    return await runtime_of(request).views.training_run(run_id)


@router.get("/training_runs/{run_id}/checkpoints", responses=errors(404))
async def run_checkpoints(request: Request, run_id: str) -> types.CheckpointsListResponse:
    """All checkpoints of a run."""
    return await runtime_of(request).views.run_checkpoints(run_id)


@router.get("/checkpoints", responses=errors(400))
async def checkpoints(
    request: Request, limit: Limit = 100, offset: Offset = 0
) -> types.CheckpointsListResponse:
    """A page of all checkpoints, newest first."""
    return await runtime_of(request).views.user_checkpoints(limit, offset)


@router.delete(
    "/training_runs/{run_id}/checkpoints/{kind}/{name}",
    status_code=204,
    responses=errors(400, 404),
)
async def delete_checkpoint(request: Request, run_id: str, kind: str, name: str) -> Response:
    """Delete a checkpoint for good."""
    await runtime_of(request).checkpoints.delete(run_id, f"{kind}/{name}")
    return Response(status_code=204)
