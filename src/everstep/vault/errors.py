"""What the vault raises.

VaultError
├── CheckpointNotFound       nothing lies under that name
├── CheckpointExists         the name is taken
├── CheckpointDamaged        what lies there is not what was written; names the file
│   ├── CheckpointQuarantined    that was found before, and the file was moved away
│   └── FormatTooNew             a newer release wrote it
├── DiskFull                 there is no room; names the path, what is needed and what is free
├── VaultBusy                what was asked for can't be done beside what is going on
└── UnsafeName               a kind, run or name that may not become a file name
"""

import errno


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


class VaultBusy(VaultError):
    """What was asked for can't be done beside what is going on in the vault."""


class UnsafeName(VaultError, ValueError):
    """A name that may not reach the file system."""
