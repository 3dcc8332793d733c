"""Deletion of runs and sessions: an extension that the official service does not have."""

from __future__ import annotations

from datetime import datetime

from everstep.wire.base import Response


class DeletionResponse(Response):
    """What is deleted with a run or a session, or would be.

    Attributes:
        id: the run or session.
        dry_run: whether nothing was deleted.
        deleted_at: when it was deleted; of a deletion that is repeated, when it was the first time.
            None for a dry run.
        training_run_ids: the run, or the runs of the session.
        sampler_ids: samplers of them, and samplers of other sessions on their checkpoints.
        checkpoints: number of checkpoints, with unnamed sampler saves.
        size_bytes: their size, as the list of checkpoints has it.
        snapshots: number of snapshots.
        freed_bytes: size of the files that nothing else needs, which garbage collection removes.
            None if other manifests can't be read.
        operations: number of operations.
        unfinished_operations: how many of them have not ended.
    """

    id: str
    dry_run: bool
    deleted_at: datetime | None
    training_run_ids: list[str]
    sampler_ids: list[str]
    checkpoints: int
    size_bytes: int
    snapshots: int
    freed_bytes: int | None
    operations: int
    unfinished_operations: int
