"""Everstep keeps every training step.

``import everstep as tinker`` runs a script written for the official SDK. Names are loaded when
they are first used, so that the import itself is quick and light.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep import auth, types
    from everstep.client import (
        AdminClient,
        APIFuture,
        LossHandle,
        PerDatumLossFn,
        RequestEvent,
        RestClient,
        SamplingClient,
        ServiceClient,
        TrainingClient,
        download_checkpoint,
    )
    from everstep.client._errors import (
        APIConnectionError,
        APIError,
        APIResponseValidationError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        BillingError,
        ConflictError,
        DownloadError,
        InternalServerError,
        LocalServiceError,
        NotFoundError,
        PermissionDeniedError,
        RateLimitError,
        RequestFailedError,
        TinkerError,
        UnprocessableEntityError,
    )
    from everstep.client._experimental import ExperimentalWarning
    from everstep.client._futures import (
        BackcompatSamplingClientFuture,
        BackcompatTrainingClientFuture,
    )
    from everstep.client._group_names import GroupCheckpoint
    from everstep.client._http import RequestOptions, Timeout
    from everstep.client.checkpoint_group import CheckpointGroup, RestoredGroup
    from everstep.client.checkpoint_policy import CheckpointPolicy
    from everstep.client.checkpointer import Checkpointer, SaveFuture
    from everstep.client.loop_errors import (
        CheckpointError,
        CheckpointFailed,
        CheckpointNotConfirmed,
        CheckpointsUnusable,
        GroupError,
        LoopStateDamaged,
        LoopStateLost,
        RecoveryFailed,
        RunLost,
        Superseded,
    )
    from everstep.client.loop_events import LoopEvent
    from everstep.client.loop_state import LoopState
    from everstep.client.recovery import Recovery
    from everstep.client.recovery_policy import RecoveryPolicy
    from everstep.client.resume import Resumed, ResumeReport, resume_or_create
    from everstep.client.run_monitor import RunMonitor
    from everstep.wire.types import (
        AdamOptimizerConfig,
        AdamParams,
        Checkpoint,
        CheckpointType,
        Datum,
        DimuonOptimizerConfig,
        DimuonParams,
        DmelChunk,
        EncodedTextChunk,
        ForwardBackwardOutput,
        LoraConfig,
        ModelID,
        ModelInput,
        ModelInputChunk,
        OptimParams,
        OptimStepRequest,
        OptimStepResponse,
        ParsedCheckpointTinkerPath,
        PromptProvenanceSpan,
        SampledProvenanceSpan,
        SampledSequence,
        SampleRequest,
        SampleResponse,
        SamplingParams,
        StopReason,
        TensorData,
        TensorDtype,
        TrainingRun,
    )

__title__ = "everstep"
__version__ = version(__title__)
_SUBMODULES = ("auth", "types")

_CLIENT = (
    "AdminClient",
    "APIFuture",
    "LossHandle",
    "PerDatumLossFn",
    "RequestEvent",
    "RestClient",
    "SamplingClient",
    "ServiceClient",
    "TrainingClient",
    "download_checkpoint",
)
_ERRORS = (
    "APIConnectionError",
    "APIError",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "ConflictError",
    "DownloadError",
    "InternalServerError",
    "LocalServiceError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestFailedError",
    "TinkerError",
    "UnprocessableEntityError",
)
_TYPES = (
    "AdamOptimizerConfig",
    "AdamParams",
    "Checkpoint",
    "CheckpointType",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "LoraConfig",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PromptProvenanceSpan",
    "SampledProvenanceSpan",
    "SampleRequest",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TrainingRun",
)
_LOOPS = {
    "GroupCheckpoint": "everstep.client._group_names",
    "RestoredGroup": "everstep.client.checkpoint_group",
    "CheckpointGroup": "everstep.client.checkpoint_group",
    "CheckpointError": "everstep.client.loop_errors",
    "CheckpointFailed": "everstep.client.loop_errors",
    "CheckpointNotConfirmed": "everstep.client.loop_errors",
    "CheckpointPolicy": "everstep.client.checkpoint_policy",
    "Checkpointer": "everstep.client.checkpointer",
    "CheckpointsUnusable": "everstep.client.loop_errors",
    "GroupError": "everstep.client.loop_errors",
    "LoopEvent": "everstep.client.loop_events",
    "LoopState": "everstep.client.loop_state",
    "LoopStateDamaged": "everstep.client.loop_errors",
    "LoopStateLost": "everstep.client.loop_errors",
    "Recovery": "everstep.client.recovery",
    "RecoveryFailed": "everstep.client.loop_errors",
    "RecoveryPolicy": "everstep.client.recovery_policy",
    "ResumeReport": "everstep.client.resume",
    "Resumed": "everstep.client.resume",
    "RunLost": "everstep.client.loop_errors",
    "RunMonitor": "everstep.client.run_monitor",
    "SaveFuture": "everstep.client.checkpointer",
    "Superseded": "everstep.client.loop_errors",
    "resume_or_create": "everstep.client.resume",
}
_MODULES = {
    "BackcompatSamplingClientFuture": "everstep.client._futures",
    "BackcompatTrainingClientFuture": "everstep.client._futures",
    "ExperimentalWarning": "everstep.client._experimental",
    "RequestOptions": "everstep.client._http",
    "Timeout": "everstep.client._http",
    **_LOOPS,
    **dict.fromkeys(_CLIENT, "everstep.client"),
    **dict.fromkeys(_ERRORS, "everstep.client._errors"),
    **dict.fromkeys(_TYPES, "everstep.wire.types"),
}

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AdminClient",
    "AuthenticationError",
    "BackcompatSamplingClientFuture",
    "BackcompatTrainingClientFuture",
    "BadRequestError",
    "BillingError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFailed",
    "CheckpointGroup",
    "CheckpointNotConfirmed",
    "CheckpointPolicy",
    "CheckpointType",
    "Checkpointer",
    "CheckpointsUnusable",
    "ConflictError",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "DownloadError",
    "EncodedTextChunk",
    "ExperimentalWarning",
    "ForwardBackwardOutput",
    "GroupCheckpoint",
    "GroupError",
    "InternalServerError",
    "LocalServiceError",
    "LoopEvent",
    "LoopState",
    "LoopStateDamaged",
    "LoopStateLost",
    "LoraConfig",
    "LossHandle",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PerDatumLossFn",
    "PermissionDeniedError",
    "PromptProvenanceSpan",
    "RateLimitError",
    "Recovery",
    "RecoveryFailed",
    "RecoveryPolicy",
    "RequestEvent",
    "RequestFailedError",
    "RequestOptions",
    "RestClient",
    "RestoredGroup",
    "ResumeReport",
    "Resumed",
    "RunLost",
    "RunMonitor",
    "SampleRequest",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "SaveFuture",
    "ServiceClient",
    "StopReason",
    "Superseded",
    "TensorData",
    "TensorDtype",
    "Timeout",
    "TinkerError",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "__title__",
    "__version__",
    "auth",
    "download_checkpoint",
    "resume_or_create",
    "types",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"everstep.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'everstep' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
