"""Checkpoint management: expiry, projects, traces, bulk deletion and access tokens.

Messages of routes under ``/everstep`` are extensions that the official service does not have.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from everstep.wire.base import Request, Response

MAX_TOKEN_TTL_SECONDS = 10 * 365 * 24 * 3600


class SetTtlRequest(Request):
    """Sets a checkpoint's expiry in seconds from now. A null clears it and has to be sent."""

    ttl_seconds: int | None = None


class AssignProjectRequest(Request):
    """Moves a session into a project."""

    project_id: str = Field(min_length=1, max_length=256)


class TraceExportResponse(Response):
    """The URL of a session's time line, once it is ready."""

    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


class DeleteCheckpointsRequest(Request):
    """Deletes many checkpoints independently."""

    tinker_paths: list[str] = Field(min_length=1, max_length=1000)


class DeletedCheckpoint(Response):
    """The outcome for one checkpoint: no ``error`` if it is deleted, now or before."""

    tinker_path: str
    error: str | None = None


class DeleteCheckpointsResponse(Response):
    """The outcome for each checkpoint, in the order of the request."""

    results: list[DeletedCheckpoint]


class CreateWeightsTokenRequest(Request):
    """Requests a token that gives access to one checkpoint.

    Attributes:
        tinker_path: the checkpoint's path.
        ttl_seconds: how long the token is valid, or None until it is revoked.
    """

    tinker_path: str
    ttl_seconds: int | None = Field(default=None, ge=1, le=MAX_TOKEN_TTL_SECONDS)


class WeightsTokenResponse(Response):
    """A weights access token. It is returned once, the service keeps no copy."""

    token_id: str
    weights_access_token: str
    tinker_path: str
    expires_at: datetime | None = None
