"""Responses: one type per endpoint, with the names of the official SDK."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from everstep.wire.base import Response
from everstep.wire.messages.adapted_modules import AdaptedModules
from everstep.wire.messages.inspection import EnvironmentChange
from everstep.wire.messages.optimizers import AdamOptimizerConfig, OptimizerConfig

CheckpointType = Literal["training", "sampler", "external"]


class HealthResponse(Response):
    """The service is healthy."""

    status: Literal["ok"] = "ok"


class ErrorResponse(Response):
    """The problem, with which input, and the remedy."""

    detail: str


class UntypedAPIFuture(Response):
    """A submitted operation. ``sample_seed`` is an extension."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None
    sample_seed: int | None = None


class TryAgainResponse(Response):
    """An operation that is not finished yet."""

    type: Literal["try_again"] = "try_again"
    request_id: str
    queue_state: Literal["active", "paused_capacity", "paused_rate_limit"] = "active"
    queue_state_reason: str | None = None


class CompleteMetadataResponse(Response):
    """The size of a finished operation's large result."""

    status: Literal["complete_metadata"] = "complete_metadata"
    response_payload_size: int


class RequestFailedResponse(Response):
    """A failed operation."""

    error: str
    category: str


class ClientConfigResponse(Response):
    """The server's flags for a client."""

    pjwt_auth_enabled: bool = False
    credential_default_source: str = "api_key"
    sample_dispatch_bytes_semaphore_size: int = 10 * 1024 * 1024
    inflight_response_bytes_semaphore_size: int = 50 * 1024 * 1024
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    fwdbwd_dispatch_bytes_semaphore_size: int = 50_000_000
    billing_exception_max_pause_duration_sec: int = 3600
    sample_no_retries: bool = False
    sample_enable_stuck_detection: bool = True
    sample_max_concurrent_requests: int = 2000
    use_pyqwest_transport: bool = True
    sample_use_retrieve_futures: bool = False
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = False
    proto_write_fwdbwd: bool = True
    fwd_via_fwdbwd: bool = True
    create_model_via_load_weights: bool = True


class ClientDynamicConfigResponse(Response):
    """Flags that a client requests again from time to time."""

    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False
    sample_cancel_max_batch_size: int = 64


class CreateSessionResponse(Response):
    """A session that was created."""

    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None
    type: Literal["create_session"] = "create_session"


class SessionHeartbeatResponse(Response):
    """A heartbeat was recorded."""

    type: Literal["session_heartbeat"] = "session_heartbeat"


class TelemetryResponse(Response):
    """Events were accepted."""

    status: Literal["accepted"] = "accepted"


class SupportedModel(Response):
    """A model that is served."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


class GetServerCapabilitiesResponse(Response):
    """The models that are served, and the losses by name with whose definition each has.

    The losses are an extension of Everstep.
    """

    supported_models: list[SupportedModel]
    losses: dict[str, str] = Field(default_factory=dict)


class TokenizerResponse(Response):
    """A tokenizer's files by name, in base64. This is an extension of Everstep."""

    files: dict[str, str]


class UnloadModelResponse(Response):
    """A run that was evicted from memory."""

    model_id: str
    type: Literal["unload_model"] | None = None


class ModelData(Response):
    """A run's base model."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(Response):
    """A run's model. ``lora_seed`` and ``adapted_modules`` are extensions."""

    model_id: str
    model_data: ModelData
    is_lora: bool | None = None
    lora_rank: int | None = None
    lora_seed: int | None = None
    model_name: str | None = None
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()
    adapted_modules: AdaptedModules | None = None
    type: Literal["get_info"] = "get_info"


class OptimStepResponse(Response):
    """The metrics of an optimizer step."""

    metrics: dict[str, float] | None = None


class SaveWeightsResponse(Response):
    """The path of a training checkpoint."""

    path: str
    type: Literal["save_weights"] | None = None


class LoadWeightsResponse(Response):
    """The checkpoint that was loaded, and the run."""

    path: str | None = None
    model_id: str | None = None
    type: Literal["load_weights"] | None = None


class SaveWeightsForSamplerResponse(Response):
    """The path of a sampler checkpoint."""

    path: str
    type: Literal["save_weights_for_sampler"] | None = None


class SaveWeightsForSamplerResponseInternal(Response):
    """The form on the wire: a path for a named save, a sampler for an unnamed one."""

    path: str | None = None
    sampling_session_id: str | None = None
    type: Literal["save_weights_for_sampler"] | None = None


class CreateSamplingSessionResponse(Response):
    """A sampler that was created."""

    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class GetSamplerResponse(Response):
    """The checkpoint or base model that a sampler samples from."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


class WeightsInfoResponse(Response):
    """The base model and LoRA of a checkpoint.

    ``lora_alpha``, ``lora_seed`` and ``adapted_modules`` are extensions. The last is None where the
    base model is not served.
    """

    base_model: str
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    lora_alpha: float | None = None
    lora_seed: int | None = None
    adapted_modules: AdaptedModules | None = None


class Cursor(Response):
    """A page of a list."""

    offset: int
    limit: int
    total_count: int


class Checkpoint(Response):
    """A checkpoint."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None
    base_model: str | None = None


class ParsedCheckpointTinkerPath(Response):
    """The parts of a checkpoint's path."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Parse a path, or raise ValueError (`InvalidPath`) if it isn't one."""
        from everstep.wire.paths import parse_path

        path = parse_path(tinker_path)
        return cls(
            tinker_path=tinker_path,
            training_run_id=path.run_id,
            checkpoint_type=path.kind.value,
            checkpoint_id=path.checkpoint_id,
        )


class CheckpointsListResponse(Response):
    """A list of checkpoints, with a cursor if it is a page."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(Response):
    """A run."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    environment_changes: list[EnvironmentChange] | None = None
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class TrainingRunsResponse(Response):
    """A page of runs."""

    training_runs: list[TrainingRun]
    cursor: Cursor


class GetSessionResponse(Response):
    """A session's runs and samplers."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None


class ListSessionsResponse(Response):
    """A page of session ids."""

    sessions: list[str] = Field(default_factory=list)


class SaveWeightsExternalResponse(Response):
    """The path of an external checkpoint."""

    path: str
    type: Literal["save_weights_external"] | None = None


class SaveWeightsExternalResponseInternal(Response):
    """The form on the wire, with the size of the files."""

    path: str | None = None
    size_bytes: int | None = None
    type: Literal["save_weights_external"] | None = None


class ExternalWeightsUrlsResponse(Response):
    """A signed URL for each file of an external checkpoint, and their expiry."""

    urls: dict[str, str]
    expires: datetime


class CheckpointArchiveUrlResponse(Response):
    """A signed URL of a checkpoint as a tar, and its expiry."""

    url: str
    expires: datetime


class CopyWeightsResponse(Response):
    """The path of the copy."""

    tinker_path: str


class JoinSamplingSessionResponse(Response):
    """A client's number among those of a sampler, 1 or greater."""

    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"


class FutureFinished(Response):
    """A future that has a result."""

    state: Literal["finished"] = "finished"
    request_id: str
    response_payload_uncompressed_size: int | None = None


class FutureFailed(Response):
    """A future that failed."""

    state: Literal["failed"] = "failed"
    request_id: str


FutureCompletion = FutureFinished | FutureFailed


class FuturesRetrieveResponse(Response):
    """Futures that were completed since the previous cursor."""

    completions: list[FutureCompletion]
    cursor: int
