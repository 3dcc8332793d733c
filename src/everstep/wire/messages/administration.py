"""Administration: audit log, billing, storage use and identity of a hosted service."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from everstep.wire.base import Request, Response


class AuditLogEntry(Response):
    """An event of the audit log. ``event`` is ``<resource>_<action>``."""

    timestamp: datetime
    event: str
    event_details: dict[str, Any] = Field(default_factory=dict)
    model_id: str | None = None
    tinker_path: str | None = None
    purpose: str | None = None


class AuditLogResponse(Response):
    """A day's events, in order, with the cursor of the next page if pages were requested."""

    entries: list[AuditLogEntry]
    next_cursor: int | None = None


class GetBillingUsageRequest(Request):
    """A window of time, exclusive of its end."""

    starting_on: AwareDatetime
    ending_before: AwareDatetime


class TrainingBillingEvent(Response):
    """Tokens of training passes."""

    type: Literal["training"] = "training"
    token_count: int


class SamplingPrefillBillingEvent(Response):
    """Tokens of prompts, found in the prefill cache or not."""

    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool
    token_count: int


class SamplingSampleBillingEvent(Response):
    """Tokens that were sampled."""

    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointBillingEvent(Response):
    """Checkpoints that were written."""

    type: Literal["checkpoint"] = "checkpoint"
    count: int


class StorageBillingEvent(Response):
    """Checkpoints that were kept, in gigabyte-hours."""

    type: Literal["storage"] = "storage"
    free: bool = False
    gigabyte_hours: float


BillingEventInfo = Annotated[
    TrainingBillingEvent
    | SamplingPrefillBillingEvent
    | SamplingSampleBillingEvent
    | CheckpointBillingEvent
    | StorageBillingEvent,
    Field(discriminator="type"),
]


class BillingUsageEvent(Response):
    """An hour's use of one kind."""

    bucket_start: datetime
    bucket_end: datetime
    base_model: str | None = None
    user_id: str | None = None
    user_name: str | None = None
    session_id: str | None = None
    project_id: str | None = None
    estimated_cost_usd: float | None = None
    effective_rate_usd_per_million_tokens: float | None = None
    effective_rate_usd_per_gigabyte_month: float | None = None
    event_info: BillingEventInfo


class BillingUsageSession(Response):
    """A session that use is attributed to."""

    user_metadata: dict[str, str] | None = None


class BillingUsageResponse(Response):
    """Use by the hour, and the sessions it refers to."""

    data: list[BillingUsageEvent]
    sessions: dict[str, BillingUsageSession] = Field(default_factory=dict)
    cost_data_through: datetime | None = None


class GetCurrentCheckpointStorageUsageRequest(Request):
    """Of one project, or of all."""

    project_id: str | None = None


class CurrentCheckpointStorageUsageItem(Response):
    """The storage use of one owner in one project."""

    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: float | None = None


class CurrentCheckpointStorageUsageResponse(Response):
    """The present storage use and its cost."""

    effective_rate_usd_per_gigabyte_month: float | None = None
    data: list[CurrentCheckpointStorageUsageItem]


class WhoamiResponse(Response):
    """The owner of the credentials in use."""

    user_urn: str
    org_urn: str
    email: str | None = None


class AuthTokenResponse(Response):
    """A token that stands for an API key for a limited time."""

    jwt: str
