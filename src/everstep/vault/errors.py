"""What the vault raises.

VaultError
├── CheckpointNotFound   nothing lies under that name
├── CheckpointExists     the name is taken
├── CheckpointDamaged    what lies there is not what was written; names the file
└── UnsafeName           a kind, run or name that may not become a file name
"""


class VaultError(Exception):
    """Base of the vault's errors."""


class CheckpointNotFound(VaultError):
    """There is no such checkpoint."""


class CheckpointExists(VaultError):
    """There is a checkpoint under that name."""


class CheckpointDamaged(VaultError):
    """A checkpoint whose bytes are not those that were written."""


class UnsafeName(VaultError, ValueError):
    """A name that may not reach the file system."""
