"""The vault: durable, verified checkpoints. Knows nothing of HTTP, torch or databases."""

from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    CheckpointQuarantined,
    DiskFull,
    FormatTooNew,
    UnsafeName,
    VaultBusy,
    VaultError,
)
from everstep.vault.keys import CheckpointId
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
    "UnsafeName",
    "Vault",
    "VaultBusy",
    "VaultError",
]
