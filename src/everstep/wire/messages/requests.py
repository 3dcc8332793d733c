"""Requests: one type per endpoint, with the names and defaults of the official SDK."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from everstep.integers import MAX_SECONDS
from everstep.wire.base import Request
from everstep.wire.messages.inputs import Datum, ModelInput, Seed
from everstep.wire.messages.optimizers import (
    AdamOptimizerConfig,
    AdamParams,
    OptimizerConfig,
    OtherOptimParams,
)
from everstep.wire.messages.tensors import TensorData

LossFnType = Literal[
    "cross_entropy",
    "importance_sampling",
    "ppo",
    "cispo",
    "dro",
    "gspo",
    "stable_reinforce",
    "custom",
]
SamplingClientKind = Literal["snapshot", "inflight"]
SeqId = Annotated[int, Field(ge=0, lt=2**63)]
"""A sequence id. Clients that join a sampler use blocks of 10^9, up to 10^18."""


class ClientConfigRequest(Request):
    """Requests the server's flags."""

    ignores_unknown = True
    sdk_version: str = ""


class CreateSessionRequest(Request):
    """Creates a session."""

    ignores_unknown = True
    tags: list[str] = Field(default_factory=list)
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None
    type: Literal["create_session"] = "create_session"


class SessionHeartbeatRequest(Request):
    """Reports that a session's client is alive."""

    ignores_unknown = True
    session_id: str
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(Request):
    """How a session ended."""

    ignores_unknown = True
    type: Literal["success", "errored", "interrupted"] = "success"


class FinishSessionRequest(Request):
    """Ends a session."""

    ignores_unknown = True
    reason: FinishReason = Field(default_factory=FinishReason)
    detail: str | None = None


class TelemetrySendRequest(Request):
    """A batch of a client's events."""

    ignores_unknown = True
    events: list[dict[str, Any]] = Field(default_factory=list)
    platform: str = ""
    sdk_version: str = ""
    session_id: str = ""
    process_uuid: str = ""


class LoraConfig(Request):
    """A run's adapter: rank, seed of its initialisation, and the adapted layers."""

    rank: int = 32
    seed: Seed | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModelRequest(Request):
    """Creates a run."""

    session_id: str
    model_seq_id: SeqId
    base_model: str = ""
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = AdamOptimizerConfig()
    type: Literal["create_model"] = "create_model"


class GetInfoRequest(Request):
    """Requests a run's model."""

    model_id: str
    type: Literal["get_info"] = "get_info"


class UnloadModelRequest(Request):
    """Evicts a run from memory."""

    model_id: str
    type: Literal["unload_model"] = "unload_model"


class ForwardBackwardInput(Request):
    """Datums and their loss."""

    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardRequest(Request):
    """Loss and logprobs without gradients, in JSON."""

    forward_input: ForwardBackwardInput
    model_id: str
    seq_id: SeqId | None = None


class ForwardBackwardRequest(Request):
    """Loss, logprobs and gradients, in JSON."""

    forward_backward_input: ForwardBackwardInput
    model_id: str
    seq_id: SeqId | None = None


class OptimStepRequest(Request):
    """One step of the optimizer."""

    model_id: str
    seq_id: SeqId | None = None
    adam_params: AdamParams | None = None
    optimizer_params: OtherOptimParams | None = None
    type: Literal["optim_step"] = "optim_step"


class SaveWeightsRequest(Request):
    """Saves a training checkpoint: weights, optimizer, pending gradients."""

    model_id: str
    path: str | None = None
    seq_id: SeqId | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights"] = "save_weights"


class LoadWeightsRequest(Request):
    """Loads a checkpoint: into a run (model_id, seq_id) or as a new one (session_id, …)."""

    model_id: str | None = None
    seq_id: SeqId | None = None
    session_id: str | None = None
    model_seq_id: SeqId | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    path: str
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"


class SaveWeightsForSamplerRequest(Request):
    """Saves weights for sampling, under a name or as a new sampler of the session."""

    model_id: str
    path: str | None = None
    sampling_session_seq_id: SeqId | None = None
    kind: SamplingClientKind = "snapshot"
    seq_id: SeqId | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class CreateSamplingSessionRequest(Request):
    """Creates a sampler on a checkpoint or a base model."""

    session_id: str
    sampling_session_seq_id: SeqId
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class SamplingParams(Request):
    """How to sample. A ``stop`` of None means the model's end token, an empty list means none."""

    max_tokens: int | None = None
    seed: Seed | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleRequest(Request):
    """Samples sequences, and logprobs of the prompt."""

    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingParams = Field(default_factory=SamplingParams)
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: SeqId | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"


class FutureRetrieveRequest(Request):
    """Requests a future's result."""

    ignores_unknown = True  # clients may send the future back whole
    request_id: str
    allow_metadata_only: bool = False


class WeightsInfoRequest(Request):
    """Requests the base model and LoRA configuration of a checkpoint."""

    tinker_path: str


class SaveWeightsExternalRequest(Request):
    """Saves an adapter as files to download, encrypted for ``age_encryption_recipients``."""

    model_id: str
    path: str
    seq_id: SeqId | None = None
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class CopyWeightsRequest(Request):
    """Copies a checkpoint into a project, or into a session as one of its runs.

    ``name`` is an extension of Everstep: the name of the copy, by default that of its source.
    """

    source_path: str
    destination_project_id: str | None = None
    session_id: str | None = None
    model_seq_id: SeqId | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None
    name: str | None = None


class JoinSamplingSessionRequest(Request):
    """Requests a client number of its own among the clients of a sampler."""

    sampling_session_id: str
    type: Literal["join_sampling_session"] = "join_sampling_session"


class CancelFutureRequest(Request):
    """Cancels a sample."""

    request_id: str


class SamplingSessionFuturesTarget(Request):
    """The samples of one client of a sampler."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Annotated[int, Field(ge=0, le=10**9)] = 0


class FuturesRetrieveRequest(Request):
    """Waits for many futures at once.

    Attributes:
        target: the sampler and client that the futures belong to.
        prev_cursor: the cursor of the previous answer, or 0 for the first request.
        timeout: the maximum number of seconds to wait. 0 only acknowledges results.
        retrieved_request_ids: results that are no longer needed.
    """

    target: SamplingSessionFuturesTarget
    prev_cursor: SeqId = 0
    timeout: float | None = Field(default=None, ge=0, le=MAX_SECONDS)
    retrieved_request_ids: list[str] = Field(default_factory=list)
