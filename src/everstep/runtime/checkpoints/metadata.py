"""Checkpoint metadata: expiry, publication and tags.

The ledger is authoritative. The vault holds a copy, from which the index can be rebuilt. A change
is recorded in the ledger first, flagged as not yet written to the vault, and answered when it is
written. If the process dies in between, the next start writes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint
from everstep.logs import get_logger
from everstep.runtime.authorization import event
from everstep.runtime.checkpoints.catalog import (
    expiry,
    id_of,
    parse_checkpoint,
    requested_checkpoint,
)
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.vault import VaultError
from everstep.vault.storage.keys import METADATA
from everstep.wire.messages.inspection import TagCheckpointRequest

_log = get_logger("everstep.checkpoints")
_RESERVED = "everstep_"
_RECORDED = Failpoint("runtime.mark.recorded", "a change is in the ledger, and not in the vault")
_WRITTEN = Failpoint(
    "runtime.mark.written", "a change is in the vault, and still flagged in the ledger"
)


class CheckpointMetadata:
    """Changes expiry, publication and tags of checkpoints.

    Args:
        context: the service's ledger, which records the changes, its vault and its catalog.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._ledger = context.ledger
        self._vault = context.vault
        self._catalog = context.catalog

    async def set_ttl(self, run_id: str, checkpoint_id: str, ttl_seconds: int | None) -> None:
        """Set or clear a checkpoint's expiry.

        Args:
            run_id: its run.
            checkpoint_id: ``<segment>/<name>``.
            ttl_seconds: seconds from now, None for never.

        Raises:
            Rejected: the id or the time is not valid (400), or there is no such checkpoint (404).
        """
        path = requested_checkpoint(run_id, checkpoint_id).path
        try:
            self._catalog.check_ttl(ttl_seconds)
        except OperationFailed as failure:
            raise Rejected(400, failure.message) from failure

        async def change(_: Checkpoint) -> Checkpoint | None:
            what = event("ttl_set", path, ttl_seconds=ttl_seconds)
            until = expiry(datetime.now(UTC), ttl_seconds)
            return await self._ledger.checkpoint_metadata.change(path, what, expires_at=until)

        await self._change(path, change)

    async def set_public(self, run_id: str, checkpoint_id: str, public: bool) -> None:
        """Publish a checkpoint for everyone, or make it private. Raises as `set_ttl`."""
        path = requested_checkpoint(run_id, checkpoint_id).path

        async def change(known: Checkpoint) -> Checkpoint | None:
            if known.public == public and not known.unmarked:
                return known
            what = event("publish" if public else "unpublish", path)
            return await self._ledger.checkpoint_metadata.change(path, what, public=public)

        await self._change(path, change)

    async def tag(self, request: TagCheckpointRequest) -> dict[str, str]:
        """Change a checkpoint's ``user_metadata``. Return the new value.

        Raises:
            Rejected: the path is malformed or a key is reserved (400), or there is no such
                checkpoint (404).
        """
        path = parse_checkpoint(request.tinker_path).path
        ours = [key for key in (*request.tags, *request.remove) if key.startswith(_RESERVED)]
        if ours:
            raise Rejected(
                400,
                f"{', '.join(ours)}: keys that begin with {_RESERVED!r} hold a training loop's "
                "state, and can't be changed.",
            )
        now: dict[str, str] = {}

        async def change(known: Checkpoint) -> Checkpoint | None:
            before = known.user_metadata or {}
            now.update({key: before[key] for key in before if key not in request.remove})
            now.update(request.tags)
            if now == before and not known.unmarked:
                return known
            what = event("tag", path, tags=dict(request.tags), removed=request.remove)
            return await self._ledger.checkpoint_metadata.change(path, what, user_metadata=now)

        await self._change(path, change)
        return now

    async def write_unwritten(self) -> None:
        """Write metadata to the vault that an earlier process could not, or that was damaged."""
        await self._ledger.checkpoint_metadata.mark_unwritten(await asyncio.to_thread(self._lost))
        for row in await self._ledger.checkpoint_metadata.unwritten():
            async with self._catalog.lock(row.path):
                now = await self._ledger.checkpoint_metadata.unwritten()
                for current in (each for each in now if each.path == row.path):
                    await self._write_or_log(current)

    def _lost(self) -> list[str]:
        """Return the paths of checkpoints whose metadata in the vault was damaged."""
        notes = [n for n in self._vault.quarantine.records() if n.key.startswith(METADATA)]
        found = [each for note in notes for each in note.checkpoints]
        return [each.path for each in found if each.has_path]

    async def _write_or_log(self, row: Checkpoint) -> None:
        try:
            await self._write(row)
        except (VaultError, OSError) as error:
            _log.error(
                "checkpoint metadata could not be written", checkpoint=row.path, reason=str(error)
            )

    async def _change(
        self, path: str, change: Callable[[Checkpoint], Awaitable[Checkpoint | None]]
    ) -> None:
        async with self._catalog.lock(path):  # excludes saves, deletions and collections
            known = await self._ledger.checkpoint(path)
            row = await change(known) if known is not None and known.listed else None
            if row is None:
                raise Rejected(404, f"Checkpoint {path} does not exist, or has expired.")
            if not row.unmarked:
                return
            _RECORDED()
            try:
                await self._write(row)
            except (VaultError, OSError) as error:
                _log.error(
                    "checkpoint metadata could not be written",
                    checkpoint=path,
                    reason=str(error),
                )
                raise Rejected(
                    503, f"The change of {path} could not be written to the vault; try again."
                ) from error

    async def _write(self, row: Checkpoint) -> None:
        """Write a checkpoint's metadata to the vault, and clear the flag in the ledger."""

        def write() -> None:
            manifest = self._vault.read_manifest(*id_of(row))
            self._vault.set_metadata(
                manifest,
                expires_at=row.expires_at,
                public=row.public,
                user_metadata=row.user_metadata,
            )

        await asyncio.to_thread(write)
        _WRITTEN()
        await self._ledger.checkpoint_metadata.mark_written(row.path)
