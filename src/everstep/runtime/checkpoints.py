"""Checkpoints as the service knows them: names, look-up, what may be loaded, expiry, deletion."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any
from weakref import WeakValueDictionary

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, Ledger
from everstep.runtime.access import event
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.settings import Settings
from everstep.vault import CheckpointId, CheckpointQuarantined, Vault, VaultError
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.paths import CheckpointKind, TinkerPath, parse_path, validate_name

_UNLISTED = Failpoint(
    "runtime.delete.unlisted", "a checkpoint is not listed, its manifest is there"
)


class Checkpoints:
    """Look-ups over the ledger's index and the vault."""

    def __init__(self, ledger: Ledger, vault: Vault, settings: Settings) -> None:
        self._ledger = ledger
        self._vault = vault
        self._settings = settings
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def find(self, text: str) -> Checkpoint:
        """Return the checkpoint of a path.

        Raises:
            OperationFailed: the path is malformed, or names nothing that can be loaded.
        """
        try:
            path = parse_path(text)
        except WireError as error:
            raise OperationFailed(str(error)) from error
        checkpoint = await self._ledger.checkpoint(str(path))
        if checkpoint is None:
            await self._refuse_quarantined(path)
            raise OperationFailed(
                f"Checkpoint {text} does not exist: it was never saved, was deleted, or has "
                "expired. List the run's checkpoints to see what is there."
            )
        return checkpoint

    async def usable(self, text: str) -> Checkpoint:
        """Return a checkpoint to load or sample from; raises as `find`, and for external ones."""
        checkpoint = await self.find(text)
        if checkpoint.kind == CheckpointKind.EXTERNAL:
            raise OperationFailed(
                f"Checkpoint {checkpoint.path} holds files to download and can't be loaded or "
                "sampled from. Use one that save_state or save_weights_for_sampler made."
            )
        return checkpoint

    async def loadable(self, text: str, *, optimizer: bool) -> Checkpoint:
        """Return a checkpoint that may be loaded, with its optimizer state if that is wanted.

        Raises:
            OperationFailed: nothing is there, or the optimizer state isn't; then the text names
                the path that has it, if there is one.
        """
        checkpoint = await self.usable(text)
        if optimizer and checkpoint.optimizer is None:
            twin = TinkerPath(checkpoint.run_id, CheckpointKind.TRAINING, checkpoint.name)
            text = f"Checkpoint {checkpoint.path} holds weights only, no optimizer state. "
            other = await self._ledger.checkpoint(str(twin))
            if other is not None and other.optimizer is not None:
                raise OperationFailed(text + f"Load {twin}, which has it.")
            raise OperationFailed(
                text + "Load it without the optimizer (load_state), or load a checkpoint "
                "that save_state made."
            )
        return checkpoint

    async def _refuse_quarantined(self, path: TinkerPath) -> None:
        """Raise `OperationFailed` for a checkpoint of which a file is in quarantine."""
        try:
            await asyncio.to_thread(self._vault.manifest, str(path.kind), path.run_id, path.name)
        except CheckpointQuarantined as error:
            raise OperationFailed(str(error), ErrorCategory.SERVER) from error
        except VaultError:
            return

    def source(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Where a worker finds the checkpoint in the vault."""
        return {"kind": checkpoint.kind, "run": checkpoint.run_id, "name": checkpoint.name}

    async def delete(self, run_id: str, checkpoint_id: str) -> None:
        """Delete a checkpoint: first from the index, so that what is listed can be loaded.

        One that was deleted before is no error.

        Raises:
            Rejected: the id is malformed (400) or unknown (404).
        """
        path = requested_path(run_id, checkpoint_id)
        async with self.lock(str(path)):  # a save under this name is recorded, or not yet begun
            if not await self.remove(path) and not await self._ledger.was_deleted(str(path)):
                raise Rejected(404, f"Checkpoint {path} does not exist.")

    async def remove(self, path: TinkerPath, why: str = "delete") -> bool:
        """Delete what lies under a path whose `lock` is held; returns whether it was indexed.

        Args:
            path: of the checkpoint.
            why: ``delete``, ``expire``, or ``end`` with its session; for the audit log.
        """
        if not await self._ledger.delete_checkpoint(str(path), event(why, str(path))):
            return False
        _UNLISTED()
        await asyncio.to_thread(self._vault.delete, str(path.kind), path.run_id, path.name)
        return True

    async def ended(self) -> list[Checkpoint]:
        """The unnamed sampler saves of sessions that ended, or whose client went away."""
        return await self._ledger.directory.ended(self._settings.abandoned_seconds)

    async def remove_ended(self) -> int:
        """Delete `ended`; returns how many."""
        ended = await self.ended()
        for row in ended:
            async with self.lock(row.path):
                await self.remove(parse_path(row.path), "end")
        return len(ended)

    async def follow_quarantine(self) -> int:
        """Bring the index in line with the vault: what is quarantined, and what was healed.

        For the start of a service and whenever a file was moved away.

        Returns:
            How many checkpoints changed.
        """
        return await self._ledger.set_quarantined(await asyncio.to_thread(self._quarantined))

    def _quarantined(self) -> list[str]:
        found = []
        for note in self._vault.quarantine.standing():
            for each in note.checkpoints:
                try:
                    self._vault.manifest(*each)
                except CheckpointQuarantined:
                    found.append(each)
                except VaultError:
                    continue
        return [path for path in map(path_of, found) if path is not None]

    def lock(self, path: str) -> asyncio.Lock:
        """What a save holds until it is recorded, and a deletion while it deletes."""
        return self._locks.setdefault(path, asyncio.Lock())

    def check_ttl(self, ttl_seconds: int | None) -> None:
        """Raise `OperationFailed` for a ``ttl_seconds`` out of bounds. None: never expires."""
        low, high = self._settings.min_ttl_seconds, self._settings.max_ttl_seconds
        if ttl_seconds is not None and not low <= ttl_seconds <= high:
            raise OperationFailed(
                f"ttl_seconds must be from {low} to {high}, or absent for a checkpoint that "
                f"never expires; got {ttl_seconds}."
            )


def requested_path(run_id: str, checkpoint_id: str) -> TinkerPath:
    """The path of a run's ``<segment>/<name>``; raises `Rejected` (400) for a malformed one."""
    segment, _, name = checkpoint_id.partition("/")
    try:
        path = TinkerPath(run_id, CheckpointKind.from_segment(segment), validate_name(name))
        return parse_path(str(path))
    except WireError as error:
        raise Rejected(400, str(error)) from error


def path_of(checkpoint: CheckpointId) -> str | None:
    """What clients call a checkpoint; None for a snapshot, which they don't see."""
    if checkpoint.kind not in tuple(CheckpointKind):
        return None
    return str(TinkerPath(checkpoint.run_id, CheckpointKind(checkpoint.kind), checkpoint.name))


def expiry(accepted_at: datetime, ttl_seconds: int | None) -> datetime | None:
    """When a checkpoint expires, counted from when its save was accepted."""
    return accepted_at + timedelta(seconds=ttl_seconds) if ttl_seconds is not None else None


def taken(name: str, run_id: str, kind: CheckpointKind) -> OperationFailed:
    """The failure of a save whose name is taken, in the hosted service's words."""
    return OperationFailed(
        f"Checkpoint '{name}' already exists for model {run_id} in {kind.segment}. "
        "Please choose a different name to avoid overwriting."
    )


def draft(checkpoint: Checkpoint, **fields: Any) -> dict[str, Any]:
    """The part of a manifest that the service knows, as JSON."""
    return {
        "kind": checkpoint.kind,
        "run_id": checkpoint.run_id,
        "name": checkpoint.name,
        "base_model": checkpoint.base_model,
        "lora": checkpoint.lora,
        "optimizer": checkpoint.optimizer,
        "user_metadata": checkpoint.user_metadata,
        "listed": checkpoint.listed,
        "expires_at": checkpoint.expires_at.isoformat() if checkpoint.expires_at else None,
        **fields,
    }
