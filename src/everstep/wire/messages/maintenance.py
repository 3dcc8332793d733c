"""Vault maintenance: garbage collection, pruning and quarantine of a running service."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from everstep.integers import MAX_SECONDS
from everstep.wire.base import Request, Response


class CollectRequest(Request):
    """Removes files that no checkpoint needs. A ``dry_run`` only lists them."""

    grace_seconds: float = Field(default=3600.0, ge=0, le=MAX_SECONDS)
    dry_run: bool = False


class CollectResponse(Response):
    """The checkpoints and files that are removed, or would be. ``files`` are hashes."""

    dry_run: bool
    ended: list[str]
    expired: list[str]
    orphaned: list[str]
    files: list[str]
    bytes: int


class PruneRequest(Request):
    """Deletes a run's checkpoints except those that a policy keeps. One intact one always stays.

    Attributes:
        run_id: the run.
        keep_last: keep so many of the newest.
        keep_best: keep so many of the best by ``metric``.
        metric: the name of a number in ``user_metadata``.
        mode: whether the smallest or the largest value is best.
        ttl_seconds: also keep checkpoints younger than this.
        dry_run: only list the checkpoints that would be deleted.
    """

    run_id: str
    keep_last: int = Field(default=0, ge=0, lt=2**63)
    keep_best: int = Field(default=0, ge=0, lt=2**63)
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    ttl_seconds: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    dry_run: bool = False


class PrunedCheckpoint(Response):
    """A checkpoint that is deleted or kept."""

    tinker_path: str
    time: datetime
    step: int
    size_bytes: int
    metric: float | None = None


class PruneResponse(Response):
    """The checkpoints that are deleted and kept. Those in ``passed_over`` are unreadable."""

    dry_run: bool
    deleted: list[PrunedCheckpoint]
    kept: list[PrunedCheckpoint]
    passed_over: list[str]


class QuarantineNote(Response):
    """A damaged file that was moved to quarantine."""

    file: str
    found_at: datetime
    reason: str
    checkpoints: list[str]
    runs: list[str]


class QuarantineResponse(Response):
    """All quarantined files."""

    notes: list[QuarantineNote]
