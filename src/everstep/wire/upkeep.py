"""Looking after the vault of a service that runs: what is collected, pruned and quarantined."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from everstep.wire.base import Request, Response


class CollectRequest(Request):
    """Frees the disk of what nobody needs any more; ``dry_run``: only says what that is."""

    grace_seconds: float = Field(default=3600.0, ge=0)
    dry_run: bool = False


class CollectResponse(Response):
    """What went, or would go; ``files`` are hashes."""

    dry_run: bool
    ended: list[str]
    expired: list[str]
    orphaned: list[str]
    files: list[str]
    bytes: int


class PruneRequest(Request):
    """Deletes a run's checkpoints but those that a policy keeps; one that is good always stays.

    Attributes:
        run_id: whose.
        keep_last: the newest so many.
        keep_best: the best so many by ``metric``.
        metric: the name of a number in ``user_metadata``.
        mode: whether the smallest or the largest is best.
        ttl_seconds: what is younger than that, as well.
        dry_run: only say what would go.
    """

    run_id: str
    keep_last: int = Field(default=0, ge=0)
    keep_best: int = Field(default=0, ge=0)
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    ttl_seconds: float | None = Field(default=None, gt=0)
    dry_run: bool = False


class PrunedCheckpoint(Response):
    """A checkpoint that goes or stays."""

    tinker_path: str
    time: datetime
    step: int
    size_bytes: int
    metric: float | None = None


class PruneResponse(Response):
    """What went, or would go, and what stays; ``passed_over`` can't be read and stays."""

    dry_run: bool
    deleted: list[PrunedCheckpoint]
    kept: list[PrunedCheckpoint]
    passed_over: list[str]


class QuarantineNote(Response):
    """A damaged file that was moved out of the way."""

    file: str
    found_at: datetime
    reason: str
    checkpoints: list[str]
    runs: list[str]


class QuarantineResponse(Response):
    """All of them."""

    notes: list[QuarantineNote]
