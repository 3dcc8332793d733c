"""Snapshots: what recovery starts from. A checkpoint of the run's own serves as well as one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import structlog

from everstep.ledger import Run
from everstep.vault import CheckpointNotFound, Manifest, Vault, VaultError

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
            "parents": [],
        }

    async def prune(self, run_id: str) -> int | None:
        """Delete all but the newest two of a run's snapshots.

        Returns:
            The position of the older one: no replay begins before it. None when there is one only.
        """

        def delete() -> int | None:
            names = sorted(name for _, name in self._vault.names(KIND, run_id))
            for name in names[:-_KEPT]:
                self._vault.delete(KIND, run_id, name)
            return int(names[-_KEPT]) if len(names) >= _KEPT else None

        return await asyncio.to_thread(delete)
