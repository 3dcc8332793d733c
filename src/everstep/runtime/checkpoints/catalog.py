"""Checkpoint catalog: look-up, permission to load, expiry and deletion of checkpoints."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, Ledger, Run
from everstep.ledger.deletion import describe
from everstep.ledger.records import RUN
from everstep.logs import get_logger
from everstep.runtime.absence import absent
from everstep.runtime.authorization import event
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.vault import CheckpointId, CheckpointQuarantined, Vault, VaultError, gc
from everstep.vault.storage.keys import SEGMENTS
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.paths import CheckpointKind, TinkerPath, parse_path, validate_name

if TYPE_CHECKING:
    from everstep.runtime.settings import Settings

_log = get_logger("everstep.runtime")
_LORA_FIELDS = ("rank", "alpha", "train_attn", "train_mlp", "train_unembed", "modules")
_UNLISTED = Failpoint(
    "runtime.delete.unlisted", "a checkpoint is not listed, its manifest is there"
)
_ROWS_GONE = Failpoint("runtime.deletion.rows", "a deleted run has no rows, its files are there")
_FILES_GONE = Failpoint("runtime.deletion.files", "nothing of a run is left, and none has noted it")


class CheckpointCatalog:
    """Finds and deletes checkpoints in the ledger's index and the vault.

    Args:
        ledger: the index.
        vault: the manifests and files.
        settings: bounds of expiry times, and when a session counts as abandoned.
    """

    def __init__(self, ledger: Ledger, vault: Vault, settings: Settings) -> None:
        self._ledger = ledger
        self._vault = vault
        self._settings = settings
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._finishing = asyncio.Lock()

    async def find(self, text: str) -> Checkpoint:
        """Return the checkpoint of a path.

        Raises:
            OperationFailed: the path is malformed, or the checkpoint does not exist.
        """
        try:
            wanted = parse_checkpoint(text)
        except WireError as error:
            raise OperationFailed(str(error)) from error
        checkpoint = await self._ledger.checkpoint(wanted.path)
        if checkpoint is None:
            await self._refuse_quarantined(wanted)
            tombstone = await self._ledger.deletions.find(wanted.path)
            if tombstone is not None:
                raise OperationFailed(describe(tombstone, wanted.path))
            raise OperationFailed(
                f"Checkpoint {text} does not exist: it was never saved, was deleted, or has "
                "expired. List the run's checkpoints to see what is there."
            )
        return checkpoint

    async def usable(self, text: str) -> Checkpoint:
        """Return a checkpoint to load or sample from. Raises as `find`, and for external ones."""
        checkpoint = await self.find(text)
        if checkpoint.kind == CheckpointKind.EXTERNAL:
            raise OperationFailed(
                f"Checkpoint {checkpoint.path} holds files to download and can't be loaded or "
                "sampled from. Use one that save_state or save_weights_for_sampler made."
            )
        return checkpoint

    async def loadable(self, text: str, *, optimizer: bool) -> Checkpoint:
        """Return a checkpoint that may be loaded, with its optimizer state if asked for.

        Raises:
            OperationFailed: the checkpoint or its optimizer state does not exist. The message
                names the path that has the optimizer state, if there is one.
        """
        checkpoint = await self.usable(text)
        if optimizer and checkpoint.optimizer is None:
            training = id_of(checkpoint)._replace(kind="training").path
            text = f"Checkpoint {checkpoint.path} holds weights only, no optimizer state. "
            other = await self._ledger.checkpoint(training)
            if other is not None and other.optimizer is not None:
                raise OperationFailed(text + f"Load {training}, which has it.")
            raise OperationFailed(
                text + "Load it without the optimizer (load_state), or load a checkpoint "
                "that save_state made."
            )
        return checkpoint

    async def _refuse_quarantined(self, checkpoint: CheckpointId) -> None:
        """Raise `OperationFailed` if a file of a checkpoint is in quarantine."""
        try:
            await asyncio.to_thread(self._vault.manifest, *checkpoint)
        except CheckpointQuarantined as error:
            raise OperationFailed(str(error), ErrorCategory.SERVER) from error
        except VaultError:
            return

    async def delete(self, checkpoint: CheckpointId) -> None:
        """Delete a checkpoint. A checkpoint that was deleted before is no error.

        It is removed from the index first, so that every listed checkpoint can be loaded.

        Raises:
            Rejected: it is unknown, or was deleted with its run (404).
        """
        path = checkpoint.path
        async with self.lock(path):  # a save under this name is recorded, or not yet begun
            if await self.remove(checkpoint):
                return
            deletions = self._ledger.deletions
            if not await deletions.is_checkpoint_deleted(path):
                text = f"Checkpoint {path} does not exist."
                raise await absent(self._ledger, path, text)

    async def remove(self, checkpoint: CheckpointId, why: str = "delete") -> bool:
        """Delete a checkpoint. The caller holds the `lock` of its path.

        Args:
            checkpoint: the checkpoint.
            why: ``delete``, ``expire``, or ``end`` with its session, for the audit log.

        Returns:
            Whether it was in the index.
        """
        path = checkpoint.path
        if not await self._ledger.delete_checkpoint(path, event(why, path)):
            return False
        _UNLISTED()
        await asyncio.to_thread(self._vault.delete, *checkpoint)
        return True

    async def finish_deletions(self) -> None:
        """Remove what is left of deleted runs and sessions: operations, and manifests in the vault.

        For the end of a deletion, and for interrupted ones before garbage is collected.

        Raises:
            StoreFailed: the vault's storage does not answer. No rows are left.
        """
        async with self._finishing:  # else an import could begin anew what another call removes
            found = await self._ledger.deletions.unfinished()
            if not found:
                return
            for tombstone in found:
                await self._ledger.deletions.remove_rows(tombstone)
            _ROWS_GONE()
            runs = {each.id for each in found if each.kind == RUN}
            await asyncio.to_thread(gc.remove_runs, self._vault, runs)
            _FILES_GONE()
            await self._ledger.deletions.mark_finished(each.id for each in found)

    async def resume_deletions(self) -> None:
        """Finish interrupted deletions at the start of a service. Files may be left for later."""
        try:
            await self.finish_deletions()
        except OSError as fault:  # or the bucket does not answer
            _log.warning("files of deleted runs are left for now", reason=str(fault))

    async def ended(self) -> list[Checkpoint]:
        """List the unnamed sampler saves of sessions that ended or were abandoned."""
        return await self._ledger.search.unneeded_sampler_saves(self._settings.orphan_ttl_seconds)

    async def remove_ended(self) -> int:
        """Delete the checkpoints that `ended` lists. Return how many."""
        ended = await self.ended()
        for row in ended:
            async with self.lock(row.path):
                await self.remove(id_of(row), "end")
        return len(ended)

    async def follow_quarantine(self) -> int:
        """Update the index with the checkpoints that are quarantined or were healed.

        For the start of a service, and after a file was moved to quarantine.

        Returns:
            How many checkpoints changed.
        """
        return await self._ledger.set_quarantined(await asyncio.to_thread(self._quarantined))

    def _quarantined(self) -> list[str]:
        found = []
        for note in self._vault.quarantine.records():
            for each in note.checkpoints:
                try:
                    self._vault.manifest(*each)
                except CheckpointQuarantined:
                    found.append(each)
                except VaultError:
                    continue
        return [each.path for each in found if each.has_path]

    def lock(self, path: str) -> asyncio.Lock:
        """Return the lock of a path. A save holds it until recorded, a deletion while it runs."""
        return self._locks.setdefault(path, asyncio.Lock())

    def check_ttl(self, ttl_seconds: int | None) -> None:
        """Raise `OperationFailed` if ``ttl_seconds`` is out of bounds. None means no expiry."""
        low, high = self._settings.min_ttl_seconds, self._settings.max_ttl_seconds
        if ttl_seconds is not None and not low <= ttl_seconds <= high:
            raise OperationFailed(
                f"ttl_seconds must be from {low} to {high}, or absent for a checkpoint that "
                f"never expires; got {ttl_seconds}."
            )


def parse_checkpoint(path: str) -> CheckpointId:
    """Return the checkpoint of a path that a client sent, or raise `InvalidPath`."""
    parsed = parse_path(path)
    return CheckpointId(str(parsed.kind), parsed.run_id, parsed.name)


def requested_checkpoint(run_id: str, checkpoint_id: str) -> CheckpointId:
    """Return the checkpoint of a run's ``<segment>/<name>``, or raise `Rejected` (400)."""
    segment, _, name = checkpoint_id.partition("/")
    try:
        path = TinkerPath(run_id, CheckpointKind.from_segment(segment), validate_name(name))
        return parse_checkpoint(str(path))
    except WireError as error:
        raise Rejected(400, str(error)) from error


def id_of(row: Checkpoint) -> CheckpointId:
    """Return the checkpoint that a row of the index is about."""
    return CheckpointId(row.kind, row.run_id, row.name)


def expiry(accepted_at: datetime, ttl_seconds: int | None) -> datetime | None:
    """Return when a checkpoint expires, counted from when its save was accepted."""
    return accepted_at + timedelta(seconds=ttl_seconds) if ttl_seconds is not None else None


def taken(checkpoint: CheckpointId) -> OperationFailed:
    """Return the failure of a save whose name is taken, with the hosted service's message."""
    return OperationFailed(
        f"Checkpoint '{checkpoint.name}' already exists for model {checkpoint.run_id} in "
        f"{SEGMENTS[checkpoint.kind]}. "
        "Please choose a different name to avoid overwriting."
    )


def draft(checkpoint: Checkpoint, **fields: Any) -> dict[str, Any]:
    """Return the fields of a manifest that the service knows, as JSON."""
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


def check_compatible(checkpoint: Checkpoint, record: Run) -> None:
    """Raise `OperationFailed` naming each field in which a checkpoint doesn't fit a run."""
    pairs: list[tuple[str, Any, Any]] = [
        ("base_model", checkpoint.base_model, record.base_model),
        *((field, checkpoint.lora.get(field), record.lora.get(field)) for field in _LORA_FIELDS),
    ]
    wrong = [
        f"checkpoint {field} is {theirs} but target model {field} is {ours}"
        for field, theirs, ours in pairs
        if theirs != ours
    ]
    if wrong:
        raise OperationFailed(
            "Checkpoint model configuration is incompatible with target model: "
            f"{'; '.join(wrong)}. Create a training client from the checkpoint instead.",
            ErrorCategory.USER,
        )
