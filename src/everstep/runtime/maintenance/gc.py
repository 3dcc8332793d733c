"""Garbage collection of a service: expired and orphaned checkpoints, and unreferenced files.

    ended       unnamed sampler saves of sessions that ended, or whose client went away
    expired     checkpoints that expired longer ago than the grace period
    orphaned    manifests that are older than the grace period, are not in the index, and that no
                pending operation is about to record
    files       files that no manifest names: `everstep.vault.gc`, which runs in this process

The service is the only process that collects. Workers write meanwhile: their commands are pinned
from before they are sent until the worker has replied or is gone.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from everstep.ledger import Checkpoint, Operation
from everstep.runtime import ids
from everstep.runtime.checkpoints.catalog import id_of
from everstep.runtime.context import RuntimeContext
from everstep.vault import CheckpointId, FileRef, VaultBusy, gc
from everstep.vault.storage.keys import manifest_key

SAVES = {
    ids.SAVE_WEIGHTS: "training",
    ids.SAVE_WEIGHTS_FOR_SAMPLER: "sampler",
    ids.SAVE_WEIGHTS_EXTERNAL: "external",
}
"""The kinds of operations that save, and the kinds of checkpoints that they make."""
PIN_TIMEOUT = 60.0
"""Seconds that a collection waits for the commands that are pinned when it begins."""


@dataclass(frozen=True)
class Garbage:
    """Checkpoints that may be removed."""

    ended: list[Checkpoint]
    expired: list[Checkpoint]
    orphaned: list[CheckpointId]

    @property
    def ids(self) -> set[CheckpointId]:
        """All of them, as the vault names them."""
        rows = (*self.ended, *self.expired)
        return set(map(id_of, rows)) | set(self.orphaned)


class GarbageCollector:
    """Finds and removes ended, expired and orphaned checkpoints, and unreferenced files.

    Args:
        context: the service's ledger, vault and catalog.
        grace_seconds: the minimum age of everything that is removed.
    """

    def __init__(self, context: RuntimeContext, grace_seconds: float) -> None:
        self._ledger = context.ledger
        self._vault = context.vault
        self._pins = context.pins
        self._catalog = context.catalog
        self._grace = grace_seconds
        self._stopping = threading.Event()

    def close(self) -> None:
        """End a collection of files that goes on, before its next file."""
        self._stopping.set()

    async def find(self) -> Garbage:
        """Find the checkpoints that may be removed."""
        expired = await self._ledger.expired_checkpoints(self._before())
        old = await asyncio.to_thread(self._old)  # before the index is read
        known = {each.path for each in await self._ledger.all_checkpoints()}
        awaited = {_awaited(each) for each in await self._ledger.pending_operations(SAVES)}
        orphaned = [each for each in old if each.path not in known and each not in awaited]
        return Garbage(await self._catalog.ended(), expired, orphaned)

    async def collect_files(self) -> list[FileRef]:
        """Remove the files that no checkpoint names, beside workers that save.

        Returns:
            The files that were removed.

        Raises:
            VaultBusy: commands that were pinned at the start are still being executed after
                `PIN_TIMEOUT`. Nothing was removed.
        """
        ended = True

        def pins_ended() -> bool:
            nonlocal ended
            ended = self._pins.wait(PIN_TIMEOUT)
            return ended

        removed = await asyncio.to_thread(
            gc.collect,
            self._vault,
            self._grace,
            pins_ended=pins_ended,
            stopping=self._stopping.is_set,
        )
        if not ended:
            raise VaultBusy(
                f"Saves have been going on for {PIN_TIMEOUT:.0f} s, so that no file could be "
                "removed. Collect again when they are done."
            )
        return removed

    async def unreferenced(self, found: Garbage) -> list[FileRef]:
        """Return the files that `collect_files` would remove once some checkpoints are removed."""
        return await asyncio.to_thread(gc.unreferenced, self._vault, self._grace, without=found.ids)

    async def remove(self, found: Garbage) -> None:
        """Remove garbage, unless something else was saved under its names since."""
        await self._catalog.remove_ended()
        for row in found.expired:
            async with self._catalog.lock(row.path):
                if row in await self._ledger.expired_checkpoints(self._before()):
                    await self._catalog.remove(id_of(row), "expire")
        for orphan in found.orphaned:
            async with self._catalog.lock(orphan.path):
                if await self._is_orphaned(orphan):
                    await asyncio.to_thread(self._vault.delete, *orphan)

    async def _is_orphaned(self, checkpoint: CheckpointId) -> bool:
        """Return whether a checkpoint is still orphaned. The caller holds the lock of its path."""
        waiting = await self._ledger.operations(checkpoint.run_id, status="pending", contents=False)
        if checkpoint in {_awaited(each) for each in waiting if each.kind in SAVES}:
            return False
        return await asyncio.to_thread(
            self._is_old, checkpoint
        ) and not await self._ledger.is_indexed(checkpoint.path)

    def _before(self) -> datetime:
        return datetime.now(UTC) - timedelta(seconds=self._grace)

    def _old(self) -> list[CheckpointId]:
        """Manifests older than the grace period, without those of snapshots."""
        found = (
            CheckpointId(kind, *ids) for kind in SAVES.values() for ids in self._vault.names(kind)
        )
        return [each for each in found if self._is_old(each)]

    def _is_old(self, checkpoint: CheckpointId) -> bool:
        try:
            written = self._vault.storage.modified(manifest_key(*checkpoint))
        except FileNotFoundError:
            return False  # deleted since it was listed
        return time.time() - written >= self._grace


def _awaited(operation: Operation) -> CheckpointId:
    """The checkpoint that a pending save is about to write, or has written and not recorded."""
    name = json.loads(operation.payload)["name"]
    return CheckpointId(SAVES[operation.kind], operation.scope, name)
