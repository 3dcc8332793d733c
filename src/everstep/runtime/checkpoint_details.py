"""One checkpoint, closely: what it is made of, and whether that is as it was written."""

from __future__ import annotations

import asyncio

from everstep.ledger import Checkpoint
from everstep.runtime.access import Access
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.vault import Manifest, Vault, VaultError
from everstep.vault.inspection import blob_damage
from everstep.vault.keys import blob_key
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.inspection import (
    CheckpointDetailsResponse,
    CheckpointFile,
    VerifiedFile,
    VerifyCheckpointResponse,
)


class CheckpointDetails:
    """Reads manifests and files.

    Args:
        vault: has them.
        checkpoints: finds checkpoints.
        access: says who may read them.
    """

    def __init__(self, vault: Vault, checkpoints: Checkpoints, access: Access) -> None:
        self._vault = vault
        self._checkpoints = checkpoints
        self._access = access

    async def describe(self, path: str, token: str | None = None) -> CheckpointDetailsResponse:
        """What a checkpoint is made of.

        Args:
            path: of the checkpoint.
            token: the weights access token that was sent with it, if any.

        Raises:
            Rejected: the path is malformed (400), nothing is there (404), or it is damaged (503).
        """
        row = await self._find(path, token)
        try:
            manifest = await asyncio.to_thread(self._vault.manifest, *_place(row))
        except VaultError as error:
            raise Rejected(503, str(error)) from error
        return CheckpointDetailsResponse(
            tinker_path=row.path,
            created_at=manifest.created_at,
            base_model=manifest.base_model,
            base_fingerprint=manifest.base_fingerprint,
            lora=manifest.lora,
            optimizer=manifest.optimizer,
            step=manifest.step,
            parents=manifest.parents,
            imported=manifest.imported,
            user_metadata=row.user_metadata,
            environment=manifest.environment,
            files=[
                CheckpointFile(name=name, size_bytes=ref.size, blake3=ref.blake3)
                for name, ref in sorted(manifest.files.items())
            ],
        )

    async def verify(self, path: str, token: str | None = None) -> VerifyCheckpointResponse:
        """Read a checkpoint's files through and hash them. Changes nothing; see `describe`."""
        try:
            row = await self._find(path, token)
            manifest = await asyncio.to_thread(self._vault.manifest, *_place(row))
            files = await asyncio.to_thread(self._verified, manifest)
        except _Quarantined as failure:
            return VerifyCheckpointResponse(
                tinker_path=path, ok=False, files=[], error=failure.detail
            )
        except VaultError as error:
            return VerifyCheckpointResponse(tinker_path=path, ok=False, files=[], error=str(error))
        ok = all(each.error is None for each in files)
        return VerifyCheckpointResponse(tinker_path=row.path, ok=ok, files=files)

    def _verified(self, manifest: Manifest) -> list[VerifiedFile]:
        return [
            VerifiedFile(
                name=name,
                size_bytes=ref.size,
                blake3=ref.blake3,
                error=blob_damage(self._vault.storage, blob_key(ref.blake3)),
            )
            for name, ref in sorted(manifest.files.items())
        ]

    async def _find(self, path: str, token: str | None) -> Checkpoint:
        try:
            await self._access.check(path, token)
            return await self._checkpoints.find(path)
        except WireError as error:
            raise Rejected(400, str(error)) from error
        except OperationFailed as failure:
            if failure.category == ErrorCategory.SERVER:
                raise _Quarantined(503, failure.message) from failure
            raise Rejected(404, failure.message) from failure


class _Quarantined(Rejected):
    """It was found damaged before."""


def _place(row: Checkpoint) -> tuple[str, str, str]:
    return row.kind, row.run_id, row.name
