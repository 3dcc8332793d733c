"""The vault: durable, verified checkpoints. Knows nothing of HTTP, torch or databases."""

from everstep.vault.errors import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    UnsafeName,
    VaultError,
)
from everstep.vault.manifest import FileRef, Manifest
from everstep.vault.vault import Vault

__all__ = [
    "CheckpointDamaged",
    "CheckpointExists",
    "CheckpointNotFound",
    "FileRef",
    "Manifest",
    "UnsafeName",
    "Vault",
    "VaultError",
]
