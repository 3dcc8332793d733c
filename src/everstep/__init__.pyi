"""Names that are exported lazily. `lazy_loader` reads them from this stub at run time."""

from . import auth as auth
from . import types as types
from .client import AdminClient as AdminClient
from .client import APIFuture as APIFuture
from .client import LossHandle as LossHandle
from .client import PerDatumLossFn as PerDatumLossFn
from .client import RequestEvent as RequestEvent
from .client import RestClient as RestClient
from .client import SamplingClient as SamplingClient
from .client import ServiceClient as ServiceClient
from .client import TrainingClient as TrainingClient
from .client import download_checkpoint as download_checkpoint
from .client._transport.errors import APIConnectionError as APIConnectionError
from .client._transport.errors import APIError as APIError
from .client._transport.errors import APIResponseValidationError as APIResponseValidationError
from .client._transport.errors import APIStatusError as APIStatusError
from .client._transport.errors import APITimeoutError as APITimeoutError
from .client._transport.errors import AuthenticationError as AuthenticationError
from .client._transport.errors import BadRequestError as BadRequestError
from .client._transport.errors import BillingError as BillingError
from .client._transport.errors import ConflictError as ConflictError
from .client._transport.errors import DownloadError as DownloadError
from .client._transport.errors import ExperimentalWarning as ExperimentalWarning
from .client._transport.errors import InternalServerError as InternalServerError
from .client._transport.errors import LocalServiceError as LocalServiceError
from .client._transport.errors import NotFoundError as NotFoundError
from .client._transport.errors import PermissionDeniedError as PermissionDeniedError
from .client._transport.errors import RateLimitError as RateLimitError
from .client._transport.errors import RequestFailedError as RequestFailedError
from .client._transport.errors import TinkerError as TinkerError
from .client._transport.errors import UnprocessableEntityError as UnprocessableEntityError
from .client._transport.futures import (
    BackcompatSamplingClientFuture as BackcompatSamplingClientFuture,
)
from .client._transport.futures import (
    BackcompatTrainingClientFuture as BackcompatTrainingClientFuture,
)
from .client._transport.http import RequestOptions as RequestOptions
from .client._transport.http import Timeout as Timeout
from .loops.checkpointer import Checkpointer as Checkpointer
from .loops.checkpointer import SaveFuture as SaveFuture
from .loops.errors import CheckpointError as CheckpointError
from .loops.errors import CheckpointFailed as CheckpointFailed
from .loops.errors import CheckpointNotConfirmed as CheckpointNotConfirmed
from .loops.errors import CheckpointsUnusable as CheckpointsUnusable
from .loops.errors import GroupError as GroupError
from .loops.errors import LoopStateDamaged as LoopStateDamaged
from .loops.errors import LoopStateLost as LoopStateLost
from .loops.errors import RecoveryFailed as RecoveryFailed
from .loops.errors import RunLost as RunLost
from .loops.errors import Superseded as Superseded
from .loops.events import LoopEvent as LoopEvent
from .loops.failure_classification import RecoveryPolicy as RecoveryPolicy
from .loops.group import CheckpointGroup as CheckpointGroup
from .loops.group import RestoredGroup as RestoredGroup
from .loops.group_names import GroupCheckpoint as GroupCheckpoint
from .loops.policy import CheckpointPolicy as CheckpointPolicy
from .loops.recovery import Recovery as Recovery
from .loops.resume import Resumed as Resumed
from .loops.resume import ResumeReport as ResumeReport
from .loops.resume import resume_or_create as resume_or_create
from .loops.run_monitor import RunMonitor as RunMonitor
from .loops.state import LoopState as LoopState
from .wire.types import AdamOptimizerConfig as AdamOptimizerConfig
from .wire.types import AdamParams as AdamParams
from .wire.types import Checkpoint as Checkpoint
from .wire.types import CheckpointType as CheckpointType
from .wire.types import Datum as Datum
from .wire.types import DimuonOptimizerConfig as DimuonOptimizerConfig
from .wire.types import DimuonParams as DimuonParams
from .wire.types import DmelChunk as DmelChunk
from .wire.types import EncodedTextChunk as EncodedTextChunk
from .wire.types import ForwardBackwardOutput as ForwardBackwardOutput
from .wire.types import LoraConfig as LoraConfig
from .wire.types import ModelID as ModelID
from .wire.types import ModelInput as ModelInput
from .wire.types import ModelInputChunk as ModelInputChunk
from .wire.types import OptimParams as OptimParams
from .wire.types import OptimStepRequest as OptimStepRequest
from .wire.types import OptimStepResponse as OptimStepResponse
from .wire.types import ParsedCheckpointTinkerPath as ParsedCheckpointTinkerPath
from .wire.types import PromptProvenanceSpan as PromptProvenanceSpan
from .wire.types import SampledProvenanceSpan as SampledProvenanceSpan
from .wire.types import SampledSequence as SampledSequence
from .wire.types import SampleRequest as SampleRequest
from .wire.types import SampleResponse as SampleResponse
from .wire.types import SamplingParams as SamplingParams
from .wire.types import StopReason as StopReason
from .wire.types import TensorData as TensorData
from .wire.types import TensorDtype as TensorDtype
from .wire.types import TrainingRun as TrainingRun

__all__: list[str]
__title__: str
__version__: str
