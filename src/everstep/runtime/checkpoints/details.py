"""Checkpoint details: configuration and manifest of a checkpoint, verification of its files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Protocol

from everstep.engine.models.info import ModelInfo
from everstep.ledger import Checkpoint
from everstep.runtime.adapted_modules import adapted_modules, peft_note, saved_before_note
from everstep.runtime.authorization import Authorization
from everstep.runtime.checkpoints.catalog import CheckpointCatalog, id_of
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.payloads import optimizer_of
from everstep.runtime.queries.rows import servable_one
from everstep.safetensors_files import decode_header
from everstep.vault import Manifest, Vault, VaultError
from everstep.vault.integrity import blob_damage
from everstep.vault.storage.keys import blob_key
from everstep.wire import types
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.messages.inspection import (
    CheckpointDetailsResponse,
    CheckpointFile,
    VerifiedFile,
    VerifyCheckpointResponse,
)

_ADAPTER = "adapter_model.safetensors"


class ServedModels(Protocol):
    """Says which models are served, as a pool of workers does."""

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        """The models, by name."""


class CheckpointDetails:
    """Describes and verifies checkpoints.

    Args:
        vault: their manifests and files.
        catalog: looks them up.
        authorization: decides who may read them.
        served: the base models whose modules are known.
    """

    def __init__(
        self,
        vault: Vault,
        catalog: CheckpointCatalog,
        authorization: Authorization,
        served: ServedModels,
    ) -> None:
        self._vault = vault
        self._catalog = catalog
        self._authorization = authorization
        self._served = served

    async def weights_info(
        self, tinker_path: str, token: str | None = None
    ) -> types.WeightsInfoResponse:
        """Return a checkpoint's training configuration.

        Args:
            tinker_path: the checkpoint.
            token: the weights access token of the request, if any.

        Raises:
            Rejected: the path is malformed (400), or the checkpoint does not exist (404).
        """
        try:
            await self._authorization.check(tinker_path, token)
            checkpoint = await self._catalog.find(tinker_path)
        except WireError as error:
            raise Rejected(400, str(error)) from error
        except OperationFailed as failure:
            raise Rejected(404, failure.message) from failure
        return types.WeightsInfoResponse.model_validate(
            {
                "base_model": checkpoint.base_model,
                "is_lora": True,
                "lora_rank": checkpoint.lora["rank"],
                "train_unembed": checkpoint.lora["train_unembed"],
                "train_mlp": checkpoint.lora["train_mlp"],
                "train_attn": checkpoint.lora["train_attn"],
                "lora_alpha": checkpoint.lora.get("alpha"),
                "lora_seed": checkpoint.lora.get("seed"),
                "optimizer_config": checkpoint.optimizer or optimizer_of(None),
                "adapted_modules": adapted_modules(
                    self._served.models.get(checkpoint.base_model), checkpoint.lora
                ),
            }
        )

    async def describe(self, path: str, token: str | None = None) -> CheckpointDetailsResponse:
        """Describe a checkpoint.

        Args:
            path: the checkpoint.
            token: the weights access token of the request, if any.

        Raises:
            Rejected: the path is malformed (400), the checkpoint does not exist (404), or it is
                damaged (503).
        """
        row = await self._find(path, token)
        try:
            manifest = await asyncio.to_thread(self._vault.manifest, *id_of(row))
        except VaultError as error:
            raise Rejected(503, str(error)) from error
        base = self._served.models.get(manifest.base_model)
        described = CheckpointDetailsResponse(
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
            diverged=manifest.diverged,
            files=[
                CheckpointFile(name=name, size_bytes=ref.size, blake3=ref.blake3)
                for name, ref in sorted(manifest.files.items())
            ],
            peft_parameters=list(base.projections.peft_parameters) if base is not None else [],
            notes=await asyncio.to_thread(self._notes, manifest, base),
        )
        return servable_one(described, row.path)

    def _notes(self, manifest: Manifest, base: ModelInfo | None) -> list[str]:
        """Say what PEFT does not load of a checkpoint as it would have to."""
        from everstep.interchange.peft_config import ADAPTER_CONFIG

        notes = [peft_note(base, manifest.lora)]
        if ADAPTER_CONFIG in manifest.files:
            try:
                saved = json.loads(bytes(self._vault.read(manifest, ADAPTER_CONFIG)))
            except (VaultError, ValueError):
                saved = {}  # `verify` reports damage
            notes.append(saved_before_note(base, saved))
        return [note for note in notes if note is not None]

    async def verify(self, path: str, token: str | None = None) -> VerifyCheckpointResponse:
        """Read a checkpoint's files through: their hashes, and whether its weights are finite.

        Raises as `describe`.
        """
        try:
            row = await self._find(path, token)
            manifest = await asyncio.to_thread(self._vault.manifest, *id_of(row))
            files = await asyncio.to_thread(self._verified, manifest)
        except _Quarantined as failure:
            return VerifyCheckpointResponse(
                tinker_path=path, ok=False, files=[], error=failure.detail
            )
        except VaultError as error:
            return VerifyCheckpointResponse(tinker_path=path, ok=False, files=[], error=str(error))
        ok = all(each.error is None for each in files)
        diverged = ok and await asyncio.to_thread(self._has_diverged, manifest)
        return VerifyCheckpointResponse(tinker_path=row.path, ok=ok, files=files, diverged=diverged)

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

    def _has_diverged(self, manifest: Manifest) -> bool:
        """Whether a weight is NaN or infinite. Weights that are encrypted are not read."""
        import numpy as np

        adapter = manifest.files.get(_ADAPTER)
        if adapter is None:
            return False
        data = memoryview(self._vault.storage.read(blob_key(adapter.blake3)))
        weights = (
            np.frombuffer(data[tensor.begin : tensor.end], dtype="<f4")
            for tensor in decode_header(data).values()
        )
        return not all(np.isfinite(each).all() for each in weights)

    async def _find(self, path: str, token: str | None) -> Checkpoint:
        try:
            await self._authorization.check(path, token)
            return await self._catalog.find(path)
        except WireError as error:
            raise Rejected(400, str(error)) from error
        except OperationFailed as failure:
            if failure.category == ErrorCategory.SERVER:
                raise _Quarantined(503, failure.message) from failure
            raise Rejected(404, failure.message) from failure


class _Quarantined(Rejected):
    """The checkpoint was found damaged before."""
