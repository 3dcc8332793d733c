"""What may be asked of saved checkpoints and their sessions, beyond what training clients send.

Routes under ``/everstep`` are ours; the official service has no call for what they do.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from everstep.wire.base import Request, Response

LONGEST_TOKEN_SECONDS = 10 * 365 * 24 * 3600


class SetTtlRequest(Request):
    """Has a checkpoint expire so many seconds from now; a null, which has to be sent: never."""

    ttl_seconds: int | None = None


class AssignProjectRequest(Request):
    """Moves a session into a project."""

    project_id: str = Field(min_length=1, max_length=256)


class TraceExportResponse(Response):
    """Where a session's time line can be fetched, once it is ready."""

    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class DeleteCheckpointsRequest(Request):
    """Deletes many checkpoints; each for itself."""

    tinker_paths: list[str] = Field(min_length=1, max_length=1000)


class DeletedCheckpoint(Response):
    """What came of one: ``error`` None where it is deleted, now or before."""

    tinker_path: str
    error: str | None = None


class DeleteCheckpointsResponse(Response):
    """What came of each, in the order in which they were asked for."""

    results: list[DeletedCheckpoint]


class CreateWeightsTokenRequest(Request):
    """Asks for a token that opens one checkpoint.

    Attributes:
        tinker_path: of the checkpoint.
        ttl_seconds: how long it opens it; None: until it is revoked.
    """

    tinker_path: str
    ttl_seconds: int | None = Field(default=None, ge=1, le=LONGEST_TOKEN_SECONDS)


class WeightsTokenResponse(Response):
    """A weights access token. It is told once; the service keeps no copy."""

    token_id: str
    weights_access_token: str
    tinker_path: str
    expires_at: datetime | None = None
