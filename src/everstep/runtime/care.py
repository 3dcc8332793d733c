"""Care of a running service's vault, on request: collecting, pruning, what is in quarantine."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from everstep.ledger import Ledger
from everstep.runtime import pruning
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.runtime.errors import Rejected
from everstep.runtime.upkeep import Leftovers, Upkeep, without
from everstep.runtime.worker_process import WorkerProcess
from everstep.vault import CheckpointId, FileRef, Manifest, Note, Vault
from everstep.vault.retention import Policy, metric_of
from everstep.wire.upkeep import (
    CollectRequest,
    CollectResponse,
    PrunedCheckpoint,
    PruneRequest,
    PruneResponse,
    QuarantineNote,
    QuarantineResponse,
)


class Care:
    """Looks after the vault when it is asked to.

    Args:
        ledger: the index.
        vault: the files.
        worker: removes files, as the one that writes them.
        checkpoints: deletes what is in the index.
    """

    def __init__(
        self, ledger: Ledger, vault: Vault, worker: WorkerProcess, checkpoints: Checkpoints
    ) -> None:
        self._ledger = ledger
        self._vault = vault
        self._worker = worker
        self._checkpoints = checkpoints

    async def collect(self, request: CollectRequest) -> CollectResponse:
        """Remove what nobody needs any more; raises `Rejected` (503) beside a backup."""
        grace = request.grace_seconds
        upkeep = Upkeep(self._ledger, self._vault, self._checkpoints, grace)
        found = await upkeep.leftovers()
        if request.dry_run:
            files = await asyncio.to_thread(self._would_go, grace, without(found))
        else:
            if await asyncio.to_thread(lambda: self._vault.is_held):
                raise Rejected(503, "A backup is being made; collect when it is done.")
            await upkeep.remove(found)
            command = {"command": "collect", "grace_seconds": grace}
            call = await self._worker.call(command, b"", await self._worker.wait_ready())
            header = (await call.done).header
            files = [FileRef(blake3=digest, size=size) for digest, size in header["files"]]
        return told_of(found, files, request.dry_run)

    def _would_go(self, grace: float, gone: set[CheckpointId]) -> list[FileRef]:
        return self._vault.collect(grace, dry_run=True, without=gone)

    async def prune(self, request: PruneRequest) -> PruneResponse:
        """Delete what a policy lets go; raises `Rejected` (400, 404)."""
        ttl = timedelta(seconds=request.ttl_seconds) if request.ttl_seconds is not None else None
        try:
            policy = Policy(request.keep_last, request.keep_best, request.metric, request.mode, ttl)
        except ValueError as error:
            raise Rejected(400, str(error)) from error
        found = await pruning.plan(self._ledger, self._vault, request.run_id, policy)
        if not request.dry_run:
            await pruning.delete(self._checkpoints, found.doomed)
        return PruneResponse(
            dry_run=request.dry_run,
            deleted=[_told(each, request.metric) for each in found.doomed],
            kept=[_told(each, request.metric) for each in found.kept],
            passed_over=found.passed_over,
        )

    async def quarantined(self) -> QuarantineResponse:
        """What was found damaged and moved out of the way."""
        notes = await asyncio.to_thread(lambda: list(self._vault.quarantine.standing()))
        return QuarantineResponse(notes=[_note(each) for each in notes])


def told_of(found: Leftovers, files: list[FileRef], dry_run: bool) -> CollectResponse:
    """What a collection tells.

    Args:
        found: the checkpoints that went, or would.
        files: the files that did, or would.
        dry_run: which of the two.
    """
    return CollectResponse(
        dry_run=dry_run,
        ended=[each.path for each in found.ended],
        expired=[each.path for each in found.expired],
        orphaned=[called(each) for each in found.orphaned],
        files=[ref.blake3 for ref in files],
        bytes=sum(ref.size for ref in files),
    )


def called(checkpoint: CheckpointId) -> str:
    """What a person calls a checkpoint: its path, or for a snapshot what it is."""
    return path_of(checkpoint) or str(checkpoint)


def _told(manifest: Manifest, metric: str | None) -> PrunedCheckpoint:
    return PrunedCheckpoint(
        tinker_path=called(manifest.id),
        time=manifest.created_at,
        step=manifest.step,
        size_bytes=manifest.size,
        metric=metric_of(manifest, metric) if metric is not None else None,
    )


def _note(note: Note) -> QuarantineNote:
    return QuarantineNote(
        file=note.key,
        found_at=note.found_at,
        reason=note.reason,
        checkpoints=[called(each) for each in note.checkpoints],
        runs=note.runs,
    )
