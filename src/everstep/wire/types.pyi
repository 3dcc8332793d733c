"""Names that are exported lazily. `lazy_loader` reads them from this stub at run time."""

from .base import Request as Request
from .base import Response as Response
from .base import parse as parse
from .errors import ErrorCategory as ErrorCategory
from .messages.adapted_modules import AdaptedModules as AdaptedModules
from .messages.adapted_modules import CreateModelResponse as CreateModelResponse
from .messages.administration import AuditLogEntry as AuditLogEntry
from .messages.administration import AuditLogResponse as AuditLogResponse
from .messages.administration import AuthTokenResponse as AuthTokenResponse
from .messages.administration import BillingEventInfo as BillingEventInfo
from .messages.administration import BillingUsageEvent as BillingUsageEvent
from .messages.administration import BillingUsageResponse as BillingUsageResponse
from .messages.administration import BillingUsageSession as BillingUsageSession
from .messages.administration import CheckpointBillingEvent as CheckpointBillingEvent
from .messages.administration import (
    CurrentCheckpointStorageUsageItem as CurrentCheckpointStorageUsageItem,
)
from .messages.administration import (
    CurrentCheckpointStorageUsageResponse as CurrentCheckpointStorageUsageResponse,
)
from .messages.administration import GetBillingUsageRequest as GetBillingUsageRequest
from .messages.administration import (
    GetCurrentCheckpointStorageUsageRequest as GetCurrentCheckpointStorageUsageRequest,
)
from .messages.administration import SamplingPrefillBillingEvent as SamplingPrefillBillingEvent
from .messages.administration import SamplingSampleBillingEvent as SamplingSampleBillingEvent
from .messages.administration import StorageBillingEvent as StorageBillingEvent
from .messages.administration import TrainingBillingEvent as TrainingBillingEvent
from .messages.administration import WhoamiResponse as WhoamiResponse
from .messages.aliases import FutureRetrieveResponse as FutureRetrieveResponse
from .messages.aliases import LossFnInputs as LossFnInputs
from .messages.aliases import LossFnOutput as LossFnOutput
from .messages.aliases import ModelID as ModelID
from .messages.aliases import RequestErrorCategory as RequestErrorCategory
from .messages.aliases import RequestID as RequestID
from .messages.custom_losses import CreateCustomLossRequest as CreateCustomLossRequest
from .messages.custom_losses import CreateCustomLossResponse as CreateCustomLossResponse
from .messages.custom_losses import CustomLossGraph as CustomLossGraph
from .messages.custom_losses import CustomLossInput as CustomLossInput
from .messages.custom_losses import CustomLossInputRank as CustomLossInputRank
from .messages.custom_losses import CustomLossNode as CustomLossNode
from .messages.custom_losses import CustomLossNodeOp as CustomLossNodeOp
from .messages.inputs import Datum as Datum
from .messages.inputs import DmelChunk as DmelChunk
from .messages.inputs import EncodedTextChunk as EncodedTextChunk
from .messages.inputs import ImageAssetPointerChunk as ImageAssetPointerChunk
from .messages.inputs import ImageChunk as ImageChunk
from .messages.inputs import ModelInput as ModelInput
from .messages.inputs import ModelInputChunk as ModelInputChunk
from .messages.inputs import PromptProvenanceSpan as PromptProvenanceSpan
from .messages.inputs import ProvenanceSpans as ProvenanceSpans
from .messages.inputs import SampledProvenanceSpan as SampledProvenanceSpan
from .messages.optimizers import AdamOptimizerConfig as AdamOptimizerConfig
from .messages.optimizers import AdamParams as AdamParams
from .messages.optimizers import DimuonOptimizerConfig as DimuonOptimizerConfig
from .messages.optimizers import DimuonParams as DimuonParams
from .messages.optimizers import OptimizerConfig as OptimizerConfig
from .messages.optimizers import OptimizerConfigBase as OptimizerConfigBase
from .messages.optimizers import OptimParams as OptimParams
from .messages.optimizers import OptimParamsBase as OptimParamsBase
from .messages.outputs import ForwardBackwardOutput as ForwardBackwardOutput
from .messages.outputs import PromptAltTokens as PromptAltTokens
from .messages.outputs import SampledSequence as SampledSequence
from .messages.outputs import SampleResponse as SampleResponse
from .messages.outputs import StopReason as StopReason
from .messages.outputs import TopkLogprobs as TopkLogprobs
from .messages.requests import CancelFutureRequest as CancelFutureRequest
from .messages.requests import ClientConfigRequest as ClientConfigRequest
from .messages.requests import CopyWeightsRequest as CopyWeightsRequest
from .messages.requests import CreateModelRequest as CreateModelRequest
from .messages.requests import CreateSamplingSessionRequest as CreateSamplingSessionRequest
from .messages.requests import CreateSessionRequest as CreateSessionRequest
from .messages.requests import FinishReason as FinishReason
from .messages.requests import FinishSessionRequest as FinishSessionRequest
from .messages.requests import ForwardBackwardInput as ForwardBackwardInput
from .messages.requests import ForwardBackwardRequest as ForwardBackwardRequest
from .messages.requests import ForwardRequest as ForwardRequest
from .messages.requests import FutureRetrieveRequest as FutureRetrieveRequest
from .messages.requests import FuturesRetrieveRequest as FuturesRetrieveRequest
from .messages.requests import GetInfoRequest as GetInfoRequest
from .messages.requests import JoinSamplingSessionRequest as JoinSamplingSessionRequest
from .messages.requests import LoadWeightsRequest as LoadWeightsRequest
from .messages.requests import LoraConfig as LoraConfig
from .messages.requests import LossFnType as LossFnType
from .messages.requests import OptimStepRequest as OptimStepRequest
from .messages.requests import SampleRequest as SampleRequest
from .messages.requests import SamplingClientKind as SamplingClientKind
from .messages.requests import SamplingParams as SamplingParams
from .messages.requests import SamplingSessionFuturesTarget as SamplingSessionFuturesTarget
from .messages.requests import SaveWeightsExternalRequest as SaveWeightsExternalRequest
from .messages.requests import SaveWeightsForSamplerRequest as SaveWeightsForSamplerRequest
from .messages.requests import SaveWeightsRequest as SaveWeightsRequest
from .messages.requests import SessionHeartbeatRequest as SessionHeartbeatRequest
from .messages.requests import TelemetrySendRequest as TelemetrySendRequest
from .messages.requests import UnloadModelRequest as UnloadModelRequest
from .messages.requests import WeightsInfoRequest as WeightsInfoRequest
from .messages.responses import Checkpoint as Checkpoint
from .messages.responses import CheckpointArchiveUrlResponse as CheckpointArchiveUrlResponse
from .messages.responses import CheckpointsListResponse as CheckpointsListResponse
from .messages.responses import CheckpointType as CheckpointType
from .messages.responses import ClientConfigResponse as ClientConfigResponse
from .messages.responses import ClientDynamicConfigResponse as ClientDynamicConfigResponse
from .messages.responses import CompleteMetadataResponse as CompleteMetadataResponse
from .messages.responses import CopyWeightsResponse as CopyWeightsResponse
from .messages.responses import CreateSamplingSessionResponse as CreateSamplingSessionResponse
from .messages.responses import CreateSessionResponse as CreateSessionResponse
from .messages.responses import Cursor as Cursor
from .messages.responses import ErrorResponse as ErrorResponse
from .messages.responses import ExternalWeightsUrlsResponse as ExternalWeightsUrlsResponse
from .messages.responses import FutureCompletion as FutureCompletion
from .messages.responses import FutureFailed as FutureFailed
from .messages.responses import FutureFinished as FutureFinished
from .messages.responses import FuturesRetrieveResponse as FuturesRetrieveResponse
from .messages.responses import GetInfoResponse as GetInfoResponse
from .messages.responses import GetSamplerResponse as GetSamplerResponse
from .messages.responses import GetServerCapabilitiesResponse as GetServerCapabilitiesResponse
from .messages.responses import GetSessionResponse as GetSessionResponse
from .messages.responses import HealthResponse as HealthResponse
from .messages.responses import JoinSamplingSessionResponse as JoinSamplingSessionResponse
from .messages.responses import ListSessionsResponse as ListSessionsResponse
from .messages.responses import LoadWeightsResponse as LoadWeightsResponse
from .messages.responses import ModelData as ModelData
from .messages.responses import OptimStepResponse as OptimStepResponse
from .messages.responses import ParsedCheckpointTinkerPath as ParsedCheckpointTinkerPath
from .messages.responses import RequestFailedResponse as RequestFailedResponse
from .messages.responses import SaveWeightsExternalResponse as SaveWeightsExternalResponse
from .messages.responses import (
    SaveWeightsExternalResponseInternal as SaveWeightsExternalResponseInternal,
)
from .messages.responses import SaveWeightsForSamplerResponse as SaveWeightsForSamplerResponse
from .messages.responses import (
    SaveWeightsForSamplerResponseInternal as SaveWeightsForSamplerResponseInternal,
)
from .messages.responses import SaveWeightsResponse as SaveWeightsResponse
from .messages.responses import SessionHeartbeatResponse as SessionHeartbeatResponse
from .messages.responses import SupportedModel as SupportedModel
from .messages.responses import TelemetryResponse as TelemetryResponse
from .messages.responses import TokenizerResponse as TokenizerResponse
from .messages.responses import TrainingRun as TrainingRun
from .messages.responses import TrainingRunsResponse as TrainingRunsResponse
from .messages.responses import TryAgainResponse as TryAgainResponse
from .messages.responses import UnloadModelResponse as UnloadModelResponse
from .messages.responses import UntypedAPIFuture as UntypedAPIFuture
from .messages.responses import WeightsInfoResponse as WeightsInfoResponse
from .messages.search import AccessibleSearchOwner as AccessibleSearchOwner
from .messages.search import ActiveSessionStatusQuery as ActiveSessionStatusQuery
from .messages.search import CancelledSessionStatusQuery as CancelledSessionStatusQuery
from .messages.search import CheckpointSearchCursor as CheckpointSearchCursor
from .messages.search import CheckpointSearchRequest as CheckpointSearchRequest
from .messages.search import CheckpointSearchResponse as CheckpointSearchResponse
from .messages.search import ClientFinishedSessionStatusQuery as ClientFinishedSessionStatusQuery
from .messages.search import ClientSessionFinished as ClientSessionFinished
from .messages.search import ClientSessionFinishErrored as ClientSessionFinishErrored
from .messages.search import ClientSessionFinishInterrupted as ClientSessionFinishInterrupted
from .messages.search import ClientSessionFinishReason as ClientSessionFinishReason
from .messages.search import ClientSessionFinishReasonType as ClientSessionFinishReasonType
from .messages.search import ClientSessionFinishSuccess as ClientSessionFinishSuccess
from .messages.search import FailedSessionStatusQuery as FailedSessionStatusQuery
from .messages.search import OwnSearchOwner as OwnSearchOwner
from .messages.search import SearchOwner as SearchOwner
from .messages.search import SessionActive as SessionActive
from .messages.search import SessionCancelled as SessionCancelled
from .messages.search import SessionFailed as SessionFailed
from .messages.search import SessionFailedReason as SessionFailedReason
from .messages.search import SessionFailedRequestReason as SessionFailedRequestReason
from .messages.search import (
    SessionFailedSamplingSessionReason as SessionFailedSamplingSessionReason,
)
from .messages.search import SessionFailedTrainingRunReason as SessionFailedTrainingRunReason
from .messages.search import SessionSearchCursor as SessionSearchCursor
from .messages.search import SessionSearchRequest as SessionSearchRequest
from .messages.search import SessionSearchResponse as SessionSearchResponse
from .messages.search import SessionStatus as SessionStatus
from .messages.search import SessionStatusQuery as SessionStatusQuery
from .messages.search import SessionSummary as SessionSummary
from .messages.search import UserSearchOwner as UserSearchOwner
from .messages.telemetry import EventType as EventType
from .messages.telemetry import GenericEvent as GenericEvent
from .messages.telemetry import SessionEndEvent as SessionEndEvent
from .messages.telemetry import SessionStartEvent as SessionStartEvent
from .messages.telemetry import Severity as Severity
from .messages.telemetry import TelemetryBatch as TelemetryBatch
from .messages.telemetry import TelemetryEvent as TelemetryEvent
from .messages.telemetry import UnhandledExceptionEvent as UnhandledExceptionEvent
from .messages.tensors import TensorData as TensorData
from .messages.tensors import TensorDtype as TensorDtype

__all__: list[str]
