"""What the vault raises.

VaultError
├── CheckpointNotFound       nothing lies under that name
├── CheckpointExists         the name is taken
├── CheckpointDamaged        what lies there is not what was written; names the file
│   ├── CheckpointQuarantined    that was found before, and the file was moved away
│   └── FormatTooNew             a newer release wrote it
├── DiskFull                 there is no room; names the path, what is needed and what is free
├── VaultElsewhere           the home belongs to another vault, or the vault to another home
├── VaultBusy                what was asked for can't be done beside what is going on
└── UnsafeName               a kind, run or name that may not become a file name

OSError
├── DiskFull
└── StoreFailed              the object store refused, or did not answer: it says nothing of a file
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
    """A checkpoint whose bytes are not those that were written.

    Attributes:
        key: the damaged file, as the storage calls it; None where none can be blamed.
    """

    def __init__(self, text: str, key: str | None = None) -> None:
        super().__init__(text)
        self.key = key


class CheckpointQuarantined(CheckpointDamaged):
    """A checkpoint of which a file was found damaged and moved to quarantine."""


class FormatTooNew(CheckpointDamaged):
    """A manifest of a newer release: nothing is wrong with it, but it can't be read here."""


class DiskFull(VaultError, OSError):
    """There is no room for what is to be written.

    Attributes:
        path: where.
        needed: bytes that are to be written, the reserve included.
        free: bytes that are free.
    """

    def __init__(self, text: str, path: str, needed: int, free: int) -> None:
        super().__init__(text)
        self.errno = errno.ENOSPC
        self.path = path
        self.needed = needed
        self.free = free


class StoreFailed(OSError):
    """The object store refused, or did not answer; whether it did what was asked may be unknown.

    As an error of a disk it is no `VaultError`: nothing is known of what lies there.
    """

    @classmethod
    def of(cls, store: str, what: str, error: Exception) -> StoreFailed:
        """An error of the client library in our words, without what is secret in it.

        Args:
            store: the store's URL.
            what: was done to what.
            error: the library's.
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
    """What was asked for can't be done beside what is going on in the vault."""


class UnsafeName(VaultError, ValueError):
    """A name that may not reach the file system."""


def _without_secrets(text: str) -> str:
    """A text without values that the environment keeps under the name of a secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and name.endswith(("KEY", "KEY_ID", "SECRET", "TOKEN")):
            text = text.replace(value, f"<{name}>")
    return text
