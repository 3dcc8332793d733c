"""The vault: durable, verified checkpoints. Knows nothing of HTTP, torch or databases."""

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
from everstep.vault.keys import CheckpointId
from everstep.vault.location import open_vault
from everstep.vault.manifest import FileRef, Manifest
from everstep.vault.quarantine import Note
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
    "Note",
    "StoreFailed",
    "UnsafeName",
    "Vault",
    "VaultBusy",
    "VaultElsewhere",
    "VaultError",
    "open_vault",
]
