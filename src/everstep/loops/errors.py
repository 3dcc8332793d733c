"""Errors of checkpointing, resuming and recovery.

TinkerError
└── CheckpointError
    ├── CheckpointFailed        a background save failed, with the cause attached
    ├── CheckpointNotConfirmed  a save was acknowledged, but the service doesn't list it
    ├── LoopStateLost           the service drops the user dictionary of a loop state
    ├── LoopStateDamaged        a loop state can't be read, or its checksum does not match
    ├── CheckpointsUnusable     a run has checkpoints, but none of them can be loaded
    ├── Superseded              another process has taken over the run
    ├── RunLost                 the service no longer has the run
    ├── RecoveryFailed          a lost run could not be recovered within the policy's bounds
    └── GroupError              a group of checkpoints is incomplete
"""

from __future__ import annotations

from everstep.client._transport.errors import TinkerError


class CheckpointError(TinkerError):
    """Base of errors about a loop's checkpoints."""


class CheckpointFailed(CheckpointError):
    """A background save failed. Its cause is attached."""


class CheckpointNotConfirmed(CheckpointError):
    """A save was acknowledged, but the service doesn't list the checkpoint."""


class LoopStateLost(CheckpointError):
    """The service drops ``user_metadata``, and a user dictionary is stored nowhere else."""


class LoopStateDamaged(CheckpointError):
    """A loop state can't be read, or its checksum does not match."""


class CheckpointsUnusable(CheckpointError):
    """A run has checkpoints, but none of them can be loaded."""


class Superseded(CheckpointError):
    """Another process has taken over the run name. This one has to stop."""


class RunLost(CheckpointError):
    """The service no longer has the run."""


class RecoveryFailed(CheckpointError):
    """A lost run could not be recovered within the policy's bounds."""


class GroupError(CheckpointError):
    """A group of checkpoints did not become complete, or is incomplete now."""
