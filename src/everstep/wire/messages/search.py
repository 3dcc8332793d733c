"""Search: requests and results of searches for sessions and checkpoints."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from everstep.wire.base import Request, Response
from everstep.wire.messages.responses import Checkpoint, CheckpointType

ClientSessionFinishReasonType = Literal["success", "errored", "interrupted"]


class OwnSearchOwner(Request):
    """The caller's own sessions."""

    type: Literal["own"] = "own"


class AccessibleSearchOwner(Request):
    """All sessions that the caller may list."""

    type: Literal["accessible"] = "accessible"


class UserSearchOwner(Request):
    """The sessions of these users."""

    type: Literal["user"] = "user"
    owner_urns: list[str] = Field(min_length=1, max_length=10)


SearchOwner = OwnSearchOwner | AccessibleSearchOwner | UserSearchOwner


class ActiveSessionStatusQuery(Request):
    """Sessions that are running."""

    type: Literal["active"] = "active"


class CancelledSessionStatusQuery(Request):
    """Sessions that were cancelled."""

    type: Literal["cancelled"] = "cancelled"


class FailedSessionStatusQuery(Request):
    """Sessions that failed."""

    type: Literal["failed"] = "failed"


class ClientFinishedSessionStatusQuery(Request):
    """Sessions that their client finished, for any of these reasons, or for any at all if None."""

    type: Literal["client_finished"] = "client_finished"
    reasons: list[ClientSessionFinishReasonType] | None = Field(default=None, min_length=1)


SessionStatusQuery = (
    ActiveSessionStatusQuery
    | CancelledSessionStatusQuery
    | FailedSessionStatusQuery
    | ClientFinishedSessionStatusQuery
)


class SessionSearchCursor(Response):
    """The start of the next page."""

    last_created_at: AwareDatetime
    last_session_id: str


class SessionSearchRequest(Request):
    """A search for sessions. A session has to meet every condition that is given.

    Attributes:
        session_id: exactly this session. If ``display_name`` is given too, either is enough.
        project_ids: in one of these projects.
        user_metadata: has all of these pairs.
        display_name: its name contains each of these words, ignoring case.
        owner: the sessions' owner.
        statuses: in one of these states.
        limit: sessions per page, 1 to 200.
        cursor: ``next_cursor`` of the previous page.
    """

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    display_name: str | None = Field(default=None, min_length=1)
    owner: SearchOwner = Field(default_factory=OwnSearchOwner)
    statuses: list[SessionStatusQuery] | None = Field(default=None, min_length=1)
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SessionSearchCursor | None = None


class SessionFailedRequestReason(Response):
    """A request failed the session."""

    type: Literal["request"] = "request"
    request_id: str
    request_type: str


class SessionFailedTrainingRunReason(Response):
    """A run failed the session."""

    type: Literal["training_run"] = "training_run"
    training_run_id: str


class SessionFailedSamplingSessionReason(Response):
    """A sampler failed the session."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str


SessionFailedReason = Annotated[
    SessionFailedRequestReason
    | SessionFailedTrainingRunReason
    | SessionFailedSamplingSessionReason,
    Field(discriminator="type"),
]


class SessionFailed(Response):
    """A session that failed, and the cause."""

    type: Literal["failed"] = "failed"
    category: Literal["user", "internal"]
    reason: SessionFailedReason
    message: str


class SessionCancelled(Response):
    """A session that was cancelled."""

    type: Literal["cancelled"] = "cancelled"
    detail: str | None = None


class ClientSessionFinishSuccess(Response):
    """The client's program succeeded."""

    type: Literal["success"] = "success"


class ClientSessionFinishErrored(Response):
    """The client's program failed."""

    type: Literal["errored"] = "errored"


class ClientSessionFinishInterrupted(Response):
    """The client's program was interrupted."""

    type: Literal["interrupted"] = "interrupted"


ClientSessionFinishReason = Annotated[
    ClientSessionFinishSuccess | ClientSessionFinishErrored | ClientSessionFinishInterrupted,
    Field(discriminator="type"),
]


class ClientSessionFinished(Response):
    """A session that its client finished."""

    type: Literal["client_finished"] = "client_finished"
    reason: ClientSessionFinishReason
    detail: str | None = None


class SessionActive(Response):
    """A session that is running."""

    type: Literal["active"] = "active"


SessionStatus = Annotated[
    SessionFailed | SessionCancelled | ClientSessionFinished | SessionActive,
    Field(discriminator="type"),
]


class SessionSummary(Response):
    """A session in a search's results. Its status is unknown unless it finished or runs."""

    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: SessionStatus | None = None
    checkpoints_count: int
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class SessionSearchResponse(Response):
    """A page of results, newest first. The last page has no ``next_cursor``."""

    sessions: list[SessionSummary]
    next_cursor: SessionSearchCursor | None = None


class CheckpointSearchCursor(Response):
    """The start of the next page."""

    last_created_at: AwareDatetime
    last_checkpoint_uuid: str


class CheckpointSearchRequest(Request):
    """A search for checkpoints. A checkpoint has to meet every condition that is given.

    Attributes:
        project_ids: in one of these projects.
        user_metadata: has all of these pairs.
        checkpoint_type: of this type, or of any if None.
        owner: the checkpoints' owner.
        base_models: of one of these models. An empty list finds nothing.
        limit: checkpoints per page, 1 to 200.
        cursor: ``next_cursor`` of the previous page.
    """

    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    checkpoint_type: CheckpointType | None = None
    owner: SearchOwner = Field(default_factory=OwnSearchOwner)
    base_models: list[str] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: CheckpointSearchCursor | None = None


class CheckpointSearchResponse(Response):
    """A page of results, newest first. The last page has no ``next_cursor``."""

    checkpoints: list[Checkpoint]
    next_cursor: CheckpointSearchCursor | None = None
