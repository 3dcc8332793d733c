"""Vault: durable, verified checkpoints. Independent of HTTP, torch and databases."""

from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    CheckpointQuarantined,
    DiskFull,
    FormatTooNew,
    StoreFailed,
    UnsafeName,
    VaultBusy,
    VaultElsewhere,
    VaultError,
)
from everstep.vault.manifest import FileRef, Manifest
from everstep.vault.open import open_vault
from everstep.vault.quarantine import QuarantineRecord
from everstep.vault.storage.keys import CheckpointId
from everstep.vault.vault import Vault

__all__ = [
    "CheckpointDamaged",
    "CheckpointExists",
    "CheckpointId",
    "CheckpointNotFound",
    "CheckpointQuarantined",
    "DiskFull",
    "FileRef",
    "FormatTooNew",
    "Manifest",
    "QuarantineRecord",
    "StoreFailed",
    "UnsafeName",
    "Vault",
    "VaultBusy",
    "VaultElsewhere",
    "VaultError",
    "open_vault",
]
