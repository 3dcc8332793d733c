"""Names that are exported lazily. `lazy_loader` reads them from this stub at run time."""

from .checkpointer import Checkpointer as Checkpointer
from .checkpointer import SaveFuture as SaveFuture
from .errors import CheckpointError as CheckpointError
from .errors import CheckpointFailed as CheckpointFailed
from .errors import CheckpointNotConfirmed as CheckpointNotConfirmed
from .errors import CheckpointsUnusable as CheckpointsUnusable
from .errors import GroupError as GroupError
from .errors import LoopStateDamaged as LoopStateDamaged
from .errors import LoopStateLost as LoopStateLost
from .errors import RecoveryFailed as RecoveryFailed
from .errors import RunLost as RunLost
from .errors import Superseded as Superseded
from .events import LoopEvent as LoopEvent
from .failure_classification import RecoveryPolicy as RecoveryPolicy
from .group import CheckpointGroup as CheckpointGroup
from .group import RestoredGroup as RestoredGroup
from .group_names import GroupCheckpoint as GroupCheckpoint
from .policy import CheckpointPolicy as CheckpointPolicy
from .recovery import Recovery as Recovery
from .resume import Resumed as Resumed
from .resume import ResumeReport as ResumeReport
from .resume import resume_or_create as resume_or_create
from .run_monitor import RunMonitor as RunMonitor
from .state import LoopState as LoopState

__all__: list[str]
