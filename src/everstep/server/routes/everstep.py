"""Extensions of the Tinker protocol: verification, tags, bulk deletion, tokens, maintenance."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse

from everstep._version import __version__
from everstep.runtime import OperationFailed, Rejected
from everstep.runtime.checkpoints.catalog import expiry, parse_checkpoint
from everstep.server.body import BodyRoute
from everstep.server.openapi import TAR_BODY, errors
from everstep.server.requests import CurrentRuntime, WeightsToken
from everstep.wire.errors import WireError
from everstep.wire.messages.deletion import DeletionResponse
from everstep.wire.messages.inspection import (
    CheckpointDetailsResponse,
    CheckpointRequest,
    ServiceInfoResponse,
    TagCheckpointRequest,
    TagCheckpointResponse,
    VerifyCheckpointResponse,
)
from everstep.wire.messages.maintenance import (
    CollectRequest,
    CollectResponse,
    PruneRequest,
    PruneResponse,
    QuarantineResponse,
)
from everstep.wire.messages.publication import (
    CreateWeightsTokenRequest,
    DeleteCheckpointsRequest,
    DeleteCheckpointsResponse,
    DeletedCheckpoint,
    WeightsTokenResponse,
)
from everstep.wire.messages.transfer import ImportQuery, ImportResponse

router = APIRouter(prefix="/everstep", tags=["everstep"], route_class=BodyRoute)


@router.get("/info", responses=errors())
async def info(runtime: CurrentRuntime) -> ServiceInfoResponse:
    """Identify this service. Any other service of the protocol answers with 404."""
    return ServiceInfoResponse(
        version=__version__, ready=runtime.ready, refused_models=runtime.refused_models
    )


@router.post(
    "/checkpoints/details",
    responses=errors(400, 404, 413),
)
async def checkpoint_details(
    message: CheckpointRequest, runtime: CurrentRuntime, weights_token: WeightsToken
) -> CheckpointDetailsResponse:
    """Return a checkpoint's step, configuration, lineage and files with their hashes."""
    return await runtime.checkpoint_details.describe(message.tinker_path, weights_token)


@router.post(
    "/checkpoints/verify",
    responses=errors(400, 404, 413),
)
async def verify_checkpoint(
    message: CheckpointRequest, runtime: CurrentRuntime, weights_token: WeightsToken
) -> VerifyCheckpointResponse:
    """Read a checkpoint's files and compare their hashes. Changes nothing."""
    return await runtime.checkpoint_details.verify(message.tinker_path, weights_token)


@router.post(
    "/checkpoints/tag",
    responses=errors(400, 404, 413),
)
async def tag_checkpoint(
    message: TagCheckpointRequest, runtime: CurrentRuntime
) -> TagCheckpointResponse:
    """Change a checkpoint's user_metadata. A change that makes no difference is no error."""
    metadata = await runtime.checkpoint_metadata.tag(message)
    return TagCheckpointResponse(tinker_path=message.tinker_path, user_metadata=metadata)


@router.post(
    "/checkpoints/delete",
    responses=errors(400, 413),
)
async def delete_checkpoints(
    message: DeleteCheckpointsRequest, runtime: CurrentRuntime
) -> DeleteCheckpointsResponse:
    """Delete many checkpoints for good, independently. The result has an error for each failure."""
    checkpoints = runtime.catalog
    results = []
    for text in message.tinker_paths:
        error = None
        try:
            await checkpoints.delete(parse_checkpoint(text))
        except (WireError, Rejected) as failure:
            error = str(failure)
        results.append(DeletedCheckpoint(tinker_path=text, error=error))
    return DeleteCheckpointsResponse(results=results)


@router.post(
    "/checkpoints/import",
    openapi_extra=TAR_BODY,
    responses=errors(400, 413),
)
async def import_checkpoint(
    request: Request,
    runtime: CurrentRuntime,
    query: Annotated[ImportQuery, Query()],
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> ImportResponse:
    """Import an adapter of PEFT or of another service as a checkpoint.

    A retry with the same X-Idempotency-Key, or in the same collection, creates no second one.
    """
    await runtime.loaded()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Rejected(400, "The body of an import is a tar as it is; Content-Encoding: identity.")
    return await runtime.checkpoint_importer.import_checkpoint(
        query, request.stream(), x_idempotency_key
    )


@router.post(
    "/weights_access_tokens",
    responses=errors(400, 404, 413),
)
async def create_weights_token(
    message: CreateWeightsTokenRequest, runtime: CurrentRuntime
) -> WeightsTokenResponse:
    """Create a token with which others load, sample from or copy one checkpoint."""
    try:
        checkpoint = await runtime.catalog.find(message.tinker_path)
    except OperationFailed as failure:
        raise Rejected(404, failure.message) from failure
    until = expiry(datetime.now(UTC), message.ttl_seconds)
    secret, token = await runtime.authorization.grant(checkpoint.path, until)
    return WeightsTokenResponse(
        token_id=token.token_id,
        weights_access_token=secret,
        tinker_path=token.path,
        expires_at=token.expires_at,
    )


@router.delete("/weights_access_tokens/{token_id}", status_code=204, responses=errors(404))
async def revoke_weights_token(runtime: CurrentRuntime, token_id: str) -> Response:
    """Revoke a token. An unknown token is no error."""
    await runtime.authorization.revoke(token_id)
    return Response(status_code=204)


@router.get(
    "/traces/{name}",
    response_class=FileResponse,
    responses=errors(400, 403, 404),
)
async def trace_file(
    runtime: CurrentRuntime, name: str, expires: str = Query(), signature: str = Query()
) -> FileResponse:
    """Return a session's time line by the signed URL of its export. No headers are needed."""
    path = runtime.traces.file(name, expires, signature)
    return FileResponse(path, media_type="application/json")


@router.delete("/training_runs/{run_id}", responses=errors(400, 404, 409))
async def delete_run(
    runtime: CurrentRuntime, run_id: str, dry_run: bool = False
) -> DeletionResponse:
    """Delete a run with its checkpoints, snapshots, operations and samplers, for good.

    A run that was deleted before is no error. 409 while its client is alive.
    """
    return await runtime.deletion.delete_run(run_id, dry_run=dry_run)


@router.delete("/sessions/{session_id}", responses=errors(400, 404, 409))
async def delete_session(
    runtime: CurrentRuntime, session_id: str, dry_run: bool = False
) -> DeletionResponse:
    """Delete a session with its runs, samplers and custom losses, for good. As for a run."""
    return await runtime.deletion.delete_session(session_id, dry_run=dry_run)


@router.post("/vault/collect", responses=errors(400, 413))
async def collect(
    runtime: CurrentRuntime, message: CollectRequest | None = None
) -> CollectResponse:
    """Remove files from the vault that no checkpoint needs."""
    return await runtime.vault_maintenance.collect(message or CollectRequest())


@router.post("/vault/prune", responses=errors(400, 404, 413))
async def prune(message: PruneRequest, runtime: CurrentRuntime) -> PruneResponse:
    """Delete a run's checkpoints except those that a retention policy keeps."""
    return await runtime.vault_maintenance.prune(message)


@router.get("/vault/quarantine", responses=errors())
async def quarantined(runtime: CurrentRuntime) -> QuarantineResponse:
    """List the damaged files and manifests that were moved to quarantine."""
    return await runtime.vault_maintenance.quarantined()
