"""What checkpointing, resuming and recovery raise.

TinkerError
└── CheckpointError
    ├── CheckpointFailed        a save in the background failed; the cause is attached
    ├── CheckpointNotConfirmed  a save was acknowledged, and the service doesn't show it
    ├── LoopStateLost           the service does not keep the user dictionary of a loop state
    ├── LoopStateDamaged        a loop state can't be read, or is not what was written
    ├── CheckpointsUnusable     a run has checkpoints, and none of them can be loaded
    ├── Superseded              another process has taken the run over
    ├── RunLost                 the service no longer has the run
    ├── RecoveryFailed          a run was lost, and could not be brought back within the bounds
    └── GroupError              a group of checkpoints did not become whole, or isn't
"""

from __future__ import annotations

from everstep.client._errors import TinkerError


class CheckpointError(TinkerError):
    """Base of what goes wrong with checkpoints of a loop."""


class CheckpointFailed(CheckpointError):
    """A save in the background failed; its cause is attached."""


class CheckpointNotConfirmed(CheckpointError):
    """A save was acknowledged, and the service doesn't show the checkpoint."""


class LoopStateLost(CheckpointError):
    """The service does not keep ``user_metadata``, and a user dictionary has no other place."""


class LoopStateDamaged(CheckpointError):
    """A loop state can't be read, or its checksum is another."""


class CheckpointsUnusable(CheckpointError):
    """A run has checkpoints, and none of them can be loaded."""


class Superseded(CheckpointError):
    """Another process saves under the same run name, and has taken over; this one has to stop."""


class RunLost(CheckpointError):
    """The service no longer has the run."""


class RecoveryFailed(CheckpointError):
    """A lost run could not be brought back within the policy's bounds."""


class GroupError(CheckpointError):
    """A group of checkpoints did not become whole, or isn't whole any more."""
