"""Vault maintenance over HTTP: garbage collection, pruning, quarantine."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import Rejected
from everstep.runtime.maintenance import prune
from everstep.runtime.maintenance.gc import Garbage, GarbageCollector
from everstep.runtime.queries.quarantine import name_of, quarantine_response
from everstep.vault import FileRef, Manifest, VaultBusy
from everstep.vault.retention import Policy, metric_of
from everstep.wire.messages.maintenance import (
    CollectRequest,
    CollectResponse,
    PrunedCheckpoint,
    PruneRequest,
    PruneResponse,
    QuarantineResponse,
)


class VaultMaintenance:
    """Collects, prunes and lists the quarantine of a running service's vault.

    Args:
        context: the service's ledger, vault and catalog.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._context = context
        self._vault = context.vault
        self._catalog = context.catalog

    async def collect(self, request: CollectRequest) -> CollectResponse:
        """Remove ended, expired and orphaned checkpoints, and unreferenced files.

        Raises:
            Rejected: a backup or another collection goes on, or saves don't end (503).
        """
        collector = GarbageCollector(self._context, request.grace_seconds)
        found = await collector.find()
        if request.dry_run:
            files = await collector.unreferenced(found)
        else:
            if await asyncio.to_thread(lambda: self._vault.is_gc_paused):
                raise Rejected(
                    503, "A backup is being made, or garbage is collected; collect when it is done."
                )
            await collector.remove(found)
            try:
                files = await collector.collect_files()
            except VaultBusy as error:
                raise Rejected(503, str(error)) from error
        return collect_response(found, files, request.dry_run)

    async def prune(self, request: PruneRequest) -> PruneResponse:
        """Delete the checkpoints of a run that a policy doesn't keep.

        Raises:
            Rejected: the policy is not valid (400), or there is no such run (404).
        """
        ttl = timedelta(seconds=request.ttl_seconds) if request.ttl_seconds is not None else None
        try:
            policy = Policy(request.keep_last, request.keep_best, request.metric, request.mode, ttl)
        except ValueError as error:
            raise Rejected(400, str(error)) from error
        found = await prune.plan(self._context, request.run_id, policy)
        if not request.dry_run:
            await prune.delete(self._catalog, found.doomed)
        return PruneResponse(
            dry_run=request.dry_run,
            deleted=[_pruned(each, request.metric) for each in found.doomed],
            kept=[_pruned(each, request.metric) for each in found.kept],
            passed_over=found.passed_over,
        )

    async def quarantined(self) -> QuarantineResponse:
        """List the damaged files that were moved away."""
        return await asyncio.to_thread(quarantine_response, self._vault)


def collect_response(found: Garbage, files: list[FileRef], dry_run: bool) -> CollectResponse:
    """Describe a collection.

    Args:
        found: the removed checkpoints.
        files: the removed files.
        dry_run: whether they only would be removed.
    """
    return CollectResponse(
        dry_run=dry_run,
        ended=[each.path for each in found.ended],
        expired=[each.path for each in found.expired],
        orphaned=[name_of(each) for each in found.orphaned],
        files=[ref.blake3 for ref in files],
        bytes=sum(ref.size for ref in files),
    )


def _pruned(manifest: Manifest, metric: str | None) -> PrunedCheckpoint:
    return PrunedCheckpoint(
        tinker_path=name_of(manifest.id),
        time=manifest.created_at,
        step=manifest.step,
        size_bytes=manifest.size,
        metric=metric_of(manifest, metric) if metric is not None else None,
    )
