"""What the Tinker protocol has no call for: verification, tags, bulk deletion, tokens, upkeep."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse

from everstep.runtime import OperationFailed, Rejected
from everstep.runtime.checkpoints import expiry
from everstep.server.common import body_of, runtime_of, weights_token_of
from everstep.server.openapi import TAKES_TAR, errors, takes
from everstep.wire.base import parse
from everstep.wire.errors import WireError
from everstep.wire.inspection import (
    CheckpointDetailsResponse,
    CheckpointRequest,
    ServiceInfoResponse,
    TagCheckpointRequest,
    TagCheckpointResponse,
    VerifyCheckpointResponse,
)
from everstep.wire.paths import parse_path
from everstep.wire.publication import (
    CreateWeightsTokenRequest,
    DeleteCheckpointsRequest,
    DeleteCheckpointsResponse,
    DeletedCheckpoint,
    WeightsTokenResponse,
)
from everstep.wire.transfer import ImportQuery, ImportResponse
from everstep.wire.upkeep import (
    CollectRequest,
    CollectResponse,
    PruneRequest,
    PruneResponse,
    QuarantineResponse,
)

router = APIRouter(prefix="/everstep", tags=["everstep"])


@router.get("/info", responses=errors())
async def info(request: Request) -> ServiceInfoResponse:
    """What this service is. Any other service of the protocol answers with 404."""
    return ServiceInfoResponse(version=version("everstep"), ready=runtime_of(request).ready)


@router.post(
    "/checkpoints/details",
    openapi_extra=takes(CheckpointRequest),
    responses=errors(400, 404, 413),
)
async def checkpoint_details(request: Request) -> CheckpointDetailsResponse:
    """What a checkpoint is made of: step, configuration, lineage, files with their hashes."""
    message = parse(CheckpointRequest, await body_of(request))
    details = runtime_of(request).details
    return await details.describe(message.tinker_path, weights_token_of(request))


@router.post(
    "/checkpoints/verify",
    openapi_extra=takes(CheckpointRequest),
    responses=errors(400, 404, 413),
)
async def verify_checkpoint(request: Request) -> VerifyCheckpointResponse:
    """Read a checkpoint's files through and hash them. Changes nothing."""
    message = parse(CheckpointRequest, await body_of(request))
    details = runtime_of(request).details
    return await details.verify(message.tinker_path, weights_token_of(request))


@router.post(
    "/checkpoints/tag",
    openapi_extra=takes(TagCheckpointRequest),
    responses=errors(400, 404, 413),
)
async def tag_checkpoint(request: Request) -> TagCheckpointResponse:
    """Change a checkpoint's user_metadata. What is so already is no error."""
    message = parse(TagCheckpointRequest, await body_of(request))
    metadata = await runtime_of(request).lifetimes.tag(message)
    return TagCheckpointResponse(tinker_path=message.tinker_path, user_metadata=metadata)


@router.post(
    "/checkpoints/delete",
    openapi_extra=takes(DeleteCheckpointsRequest),
    responses=errors(400, 413),
)
async def delete_checkpoints(request: Request) -> DeleteCheckpointsResponse:
    """Delete many checkpoints for good, each for itself: what can't be deleted is told."""
    message = parse(DeleteCheckpointsRequest, await body_of(request))
    checkpoints = runtime_of(request).checkpoints
    results = []
    for text in message.tinker_paths:
        error = None
        try:
            path = parse_path(text)
            await checkpoints.delete(path.run_id, path.checkpoint_id)
        except (WireError, Rejected) as failure:
            error = str(failure)
        results.append(DeletedCheckpoint(tinker_path=text, error=error))
    return DeleteCheckpointsResponse(results=results)


@router.post(
    "/checkpoints/import",
    openapi_extra=TAKES_TAR,
    responses=errors(400, 413),
)
async def import_checkpoint(
    request: Request,
    query: Annotated[ImportQuery, Query()],
    x_idempotency_key: Annotated[str | None, Header()] = None,
) -> ImportResponse:
    """Make a checkpoint of an adapter that was made elsewhere: PEFT's, or another service's.

    A retry with the same X-Idempotency-Key, or in the same collection, makes no second one.
    """
    runtime = runtime_of(request)
    await runtime.loaded()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Rejected(400, "The body of an import is a tar as it is; Content-Encoding: identity.")
    return await runtime.imports.bring_in(query, request.stream(), x_idempotency_key)


@router.post(
    "/weights_access_tokens",
    openapi_extra=takes(CreateWeightsTokenRequest),
    responses=errors(400, 404, 413),
)
async def create_weights_token(request: Request) -> WeightsTokenResponse:
    """Make a token with which others load, sample from or copy one checkpoint."""
    message = parse(CreateWeightsTokenRequest, await body_of(request))
    runtime = runtime_of(request)
    try:
        checkpoint = await runtime.checkpoints.find(message.tinker_path)
    except OperationFailed as failure:
        raise Rejected(404, failure.message) from failure
    until = expiry(datetime.now(UTC), message.ttl_seconds)
    secret, token = await runtime.access.grant(checkpoint.path, until)
    return WeightsTokenResponse(
        token_id=token.token_id,
        weights_access_token=secret,
        tinker_path=token.path,
        expires_at=token.expires_at,
    )


@router.delete("/weights_access_tokens/{token_id}", status_code=204, responses=errors(404))
async def revoke_weights_token(request: Request, token_id: str) -> Response:
    """Have a token open nothing any more. One that is not there is no error."""
    await runtime_of(request).access.revoke(token_id)
    return Response(status_code=204)


@router.get(
    "/traces/{name}",
    response_class=FileResponse,
    responses=errors(400, 403, 404),
)
async def trace_file(
    request: Request, name: str, expires: str = Query(), signature: str = Query()
) -> FileResponse:
    """A session's time line, by the address that its export gave; no headers are needed."""
    path = runtime_of(request).traces.file(name, expires, signature)
    return FileResponse(path, media_type="application/json")


@router.post("/vault/collect", openapi_extra=takes(CollectRequest), responses=errors(400, 413))
async def collect(request: Request) -> CollectResponse:
    """Free the disk of what nobody needs any more."""
    message = parse(CollectRequest, await body_of(request) or b"{}")
    return await runtime_of(request).care.collect(message)


@router.post("/vault/prune", openapi_extra=takes(PruneRequest), responses=errors(400, 404, 413))
async def prune(request: Request) -> PruneResponse:
    """Delete a run's checkpoints but those that a policy keeps."""
    message = parse(PruneRequest, await body_of(request))
    return await runtime_of(request).care.prune(message)


@router.get("/vault/quarantine", responses=errors())
async def quarantined(request: Request) -> QuarantineResponse:
    """What was found damaged and moved out of the way."""
    return await runtime_of(request).care.quarantined()
