"""The client: the official SDK's surface, and comforts for loops, with any service."""

from everstep.client._downloads import download_checkpoint
from everstep.client._errors import DownloadError, RequestFailedError, TinkerError
from everstep.client._futures import APIFuture
from everstep.client._group_names import GroupCheckpoint
from everstep.client._hooks import RequestEvent
from everstep.client.admin_client import AdminClient
from everstep.client.checkpoint_group import CheckpointGroup, RestoredGroup
from everstep.client.checkpoint_policy import CheckpointPolicy
from everstep.client.checkpointer import Checkpointer
from everstep.client.loop_errors import CheckpointError
from everstep.client.loop_events import LoopEvent
from everstep.client.loop_state import LoopState
from everstep.client.loss_handle import LossHandle, PerDatumLossFn
from everstep.client.recovery import Recovery
from everstep.client.recovery_policy import RecoveryPolicy
from everstep.client.rest_client import RestClient
from everstep.client.resume import Resumed, ResumeReport, resume_or_create
from everstep.client.run_monitor import RunMonitor
from everstep.client.sampling_client import SamplingClient
from everstep.client.service_client import ServiceClient
from everstep.client.training_client import TrainingClient

__all__ = [
    "APIFuture",
    "AdminClient",
    "CheckpointError",
    "CheckpointGroup",
    "CheckpointPolicy",
    "Checkpointer",
    "DownloadError",
    "GroupCheckpoint",
    "LoopEvent",
    "LoopState",
    "LossHandle",
    "PerDatumLossFn",
    "Recovery",
    "RecoveryPolicy",
    "RequestEvent",
    "RequestFailedError",
    "RestClient",
    "RestoredGroup",
    "ResumeReport",
    "Resumed",
    "RunMonitor",
    "SamplingClient",
    "ServiceClient",
    "TinkerError",
    "TrainingClient",
    "download_checkpoint",
    "resume_or_create",
]
