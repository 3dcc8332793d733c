"""Upkeep of the vault: what nobody needs any more, and removing it.

    ended       unnamed sampler saves of sessions that ended, or whose client went away
    expired     checkpoints whose time was up a grace period ago
    orphaned    manifests that the index doesn't know, that no operation is about to record, and
                that are older than the grace period
    files       what no manifest names; see `Vault.collect`

The first three are removed by the process that has the ledger, the last by the one that writes the
vault: a collection beside a save of another process would not see what that is putting.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from everstep.ledger import Checkpoint, Ledger, Operation
from everstep.runtime import names
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.vault import CheckpointId, Vault
from everstep.vault.keys import manifest_key
from everstep.wire.paths import parse_path

SAVES = {
    names.SAVE_WEIGHTS: "training",
    names.SAVE_WEIGHTS_FOR_SAMPLER: "sampler",
    names.SAVE_WEIGHTS_EXTERNAL: "external",
}
"""Operations that save, with the kind of what they save."""


@dataclass(frozen=True)
class Leftovers:
    """Checkpoints that may go."""

    ended: list[Checkpoint]
    expired: list[Checkpoint]
    orphaned: list[CheckpointId]


def without(found: Leftovers) -> set[CheckpointId]:
    """What the vault holds of them."""
    rows = (*found.ended, *found.expired)
    return {CheckpointId(e.kind, e.run_id, e.name) for e in rows} | set(found.orphaned)


class Upkeep:
    """Finds and removes what nobody needs any more.

    Args:
        ledger: has the index and the operations.
        vault: has the manifests.
        checkpoints: deletes what is in the index.
        grace_seconds: for how long everything stays all the same.
    """

    def __init__(
        self, ledger: Ledger, vault: Vault, checkpoints: Checkpoints, grace_seconds: float
    ) -> None:
        self._ledger = ledger
        self._vault = vault
        self._checkpoints = checkpoints
        self._grace = grace_seconds

    async def leftovers(self) -> Leftovers:
        """The checkpoints that may go."""
        expired = await self._ledger.expired_checkpoints(self._before())
        old = await asyncio.to_thread(self._old)  # before the index is asked
        known = {each.path for each in await self._ledger.every_checkpoint()}
        awaited = {_awaited(each) for each in await self._ledger.pending_operations(SAVES)}
        orphaned = [each for each in old if path_of(each) not in known and each not in awaited]
        return Leftovers(await self._checkpoints.ended(), expired, orphaned)

    async def remove(self, found: Leftovers) -> None:
        """Remove checkpoints that may go, unless something else was saved under their names."""
        await self._checkpoints.remove_ended()
        for row in found.expired:
            async with self._checkpoints.lock(row.path):
                if row in await self._ledger.expired_checkpoints(self._before()):
                    await self._checkpoints.remove(parse_path(row.path), "expire")
        for orphan in found.orphaned:
            async with self._checkpoints.lock(str(path_of(orphan))):
                if await self._is_orphaned(orphan):
                    await asyncio.to_thread(self._vault.delete, *orphan)

    async def _is_orphaned(self, checkpoint: CheckpointId) -> bool:
        """Whether that is still so, under the lock of its path."""
        waiting = await self._ledger.operations(checkpoint.run_id, status="pending")
        if checkpoint in {_awaited(each) for each in waiting if each.kind in SAVES}:
            return False
        return await asyncio.to_thread(
            self._is_old, checkpoint
        ) and not await self._ledger.is_indexed(str(path_of(checkpoint)))

    def _before(self) -> datetime:
        return datetime.now(UTC) - timedelta(seconds=self._grace)

    def _old(self) -> list[CheckpointId]:
        """Manifests that were written longer ago than the grace period, without snapshots."""
        found = (
            CheckpointId(kind, *names)
            for kind in SAVES.values()
            for names in self._vault.names(kind)
        )
        return [each for each in found if self._is_old(each)]

    def _is_old(self, checkpoint: CheckpointId) -> bool:
        try:
            written = self._vault.storage.modified(manifest_key(*checkpoint))
        except FileNotFoundError:
            return False  # deleted since it was listed
        return time.time() - written >= self._grace


def _awaited(operation: Operation) -> CheckpointId:
    """What a pending save is about to write, or has written and not recorded."""
    name = json.loads(operation.payload)["name"]
    return CheckpointId(SAVES[operation.kind], operation.scope, name)
