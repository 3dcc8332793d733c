"""Errors of the vault.

VaultError
├── CheckpointNotFound       no checkpoint has that name
├── CheckpointExists         the name is taken
├── CheckpointDamaged        bytes are not those that were written. Names the file
│   ├── CheckpointQuarantined    the damage was found before, and the file was moved away
│   └── FormatTooNew             a newer release wrote it
├── DiskFull                 not enough space. Names the path, the needed and the free bytes
├── VaultElsewhere           the home belongs to another vault, or the vault to another home
├── VaultBusy                the operation can't run beside another one that is going on
└── UnsafeName               a kind, run or name that may not become a file name

OSError
├── DiskFull
└── StoreFailed              the object store refused or did not answer. Files may be sound
"""

from __future__ import annotations

import errno
import os


class VaultError(Exception):
    """Base of the vault's errors."""


class CheckpointNotFound(VaultError):
    """There is no such checkpoint."""


class CheckpointExists(VaultError):
    """There is a checkpoint under that name."""


class CheckpointDamaged(VaultError):
    """A checkpoint's bytes are not those that were written.

    Attributes:
        key: storage key of the damaged file, None if no file can be blamed.
    """

    def __init__(self, text: str, key: str | None = None) -> None:
        super().__init__(text)
        self.key = key


HOW_TO_HEAL = (
    "Load another checkpoint. Restoring the file from a backup ('everstep restore') or saving the "
    "same bytes again heals it."
)


def damaged(label: str, file: str, damage: str, key: str) -> CheckpointDamaged:
    """Return the error for a file that is not as it was written.

    Args:
        label: the checkpoint, as messages name it.
        file: which of its files.
        damage: what is wrong with it.
        key: its storage key.
    """
    return CheckpointDamaged(f"{label} is damaged: {file} {damage}. {HOW_TO_HEAL}", key)


class CheckpointQuarantined(CheckpointDamaged):
    """A file of the checkpoint was found damaged and moved to quarantine."""


class FormatTooNew(CheckpointDamaged):
    """A newer release wrote the file. It is sound, but this release can't read it."""


class DiskFull(VaultError, OSError):
    """There is not enough space for a write.

    Attributes:
        path: the vault's directory.
        needed: bytes to be written, including the reserve.
        free: free bytes.
    """

    def __init__(self, text: str, path: str, needed: int, free: int) -> None:
        super().__init__(text)
        self.errno = errno.ENOSPC
        self.path = path
        self.needed = needed
        self.free = free


class StoreFailed(OSError):
    """The object store refused or did not answer. The effect of the request may be unknown.

    Like an error of a disk it is no `VaultError`: it says nothing about the files.
    """

    @classmethod
    def of(cls, store: str, what: str, error: Exception) -> StoreFailed:
        """Translate an error of the client library, and remove secrets from its text.

        Args:
            store: the store's URL.
            what: the operation, or the key.
            error: the library's error.
        """
        kind = type(error).__name__
        if kind in ("PermissionDeniedError", "UnauthenticatedError"):
            why = (
                "the store refused the credentials, or they don't allow this; look at the "
                "environment (AWS_ACCESS_KEY_ID, …) and the permissions in "
                "docs/guides/operations.md"
            )
        else:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            why = f"{kind}: {_without_secrets(lines[0] if lines else '')[:400]}"
        return cls(f"{store}: {what}: {why}")


class VaultElsewhere(VaultError):
    """The home belongs to another vault, or the vault to another home."""


class VaultBusy(VaultError):
    """The operation can't run beside another one that is going on."""


class UnsafeName(VaultError, ValueError):
    """A name that may not reach the file system."""


def _without_secrets(text: str) -> str:
    """Remove the values of environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if len(value) >= 8 and name.endswith(("KEY", "KEY_ID", "SECRET", "TOKEN")):
            text = text.replace(value, f"<{name}>")
    return text
