"""Snapshots: what recovery starts from. A checkpoint of the run's own serves as well as one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import structlog

from everstep.ledger import Run
from everstep.vault import CheckpointNotFound, Manifest, Vault, VaultError
from everstep.vault.inspection import is_sound

_log = structlog.get_logger("everstep.run")
KIND = "snapshot"
_KEPT = 2


class Snapshots:
    """Finds, names and prunes the snapshots of runs."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def newest_first(self, run_id: str) -> list[Manifest]:
        """All states of a run that lie in the vault with their optimizer, newest first.

        A manifest that is damaged is passed over, and told in the log.
        """
        found = await asyncio.to_thread(lambda: list(self._read(run_id)))
        return sorted(found, key=lambda m: (m.position, m.kind == KIND), reverse=True)

    def _read(self, run_id: str) -> Iterator[Manifest]:
        for kind in (KIND, "training"):
            for run, name in self._vault.names(kind, run_id):
                try:
                    yield self._vault.manifest(kind, run, name)
                except CheckpointNotFound:
                    continue  # deleted since it was listed
                except VaultError as error:
                    _log.error("a state can't be used", run=run_id, reason=str(error))

    def draft(self, run: Run, position: int, base_fingerprint: str) -> dict[str, Any]:
        """The part of a snapshot's manifest that the service knows."""
        return {
            "kind": KIND,
            "run_id": run.run_id,
            "name": f"{position:020d}",
            "base_model": run.base_model,
            "base_fingerprint": base_fingerprint,
            "lora": run.lora,
            "optimizer": run.optimizer,
            "user_metadata": None,
            "run_metadata": run.user_metadata,
            "expires_at": None,
            "position": position,
            "request_id": None,
        }

    async def prune(self, run_id: str) -> int | None:
        """Delete a run's snapshots that are older than the newest two that verify.

        Returns:
            The position of the older one: no replay begins before it. None when there is one only.
        """
        return await asyncio.to_thread(self._prune, run_id)

    def _prune(self, run_id: str) -> int | None:
        sound: list[str] = []
        for name in sorted((name for _, name in self._vault.names(KIND, run_id)), reverse=True):
            if len(sound) == _KEPT:
                self._vault.delete(KIND, run_id, name)
            elif self._verifies(run_id, name):
                sound.append(name)
        return int(sound[-1]) if len(sound) == _KEPT else None

    def _verifies(self, run_id: str, name: str) -> bool:
        try:
            sound = is_sound(self._vault, self._vault.manifest(KIND, run_id, name))
        except VaultError:
            sound = False
        if not sound:
            _log.error("a snapshot is damaged; older ones stay", run=run_id, snapshot=name)
        return sound
