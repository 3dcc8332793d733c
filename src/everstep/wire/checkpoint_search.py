"""Searching checkpoints: what may be asked, and where the next page begins."""

from __future__ import annotations

from pydantic import AwareDatetime, Field

from everstep.wire.base import Request, Response
from everstep.wire.responses import Checkpoint, CheckpointType
from everstep.wire.sessions import OwnSearchOwner, SearchOwner


class CheckpointSearchCursor(Response):
    """Where the next page begins."""

    last_created_at: AwareDatetime
    last_checkpoint_uuid: str


class CheckpointSearchRequest(Request):
    """A search; a checkpoint has to meet all that is given.

    Attributes:
        project_ids: in one of these projects.
        user_metadata: has all of these pairs.
        checkpoint_type: of this type; None: of any.
        owner: whose.
        base_models: of one of these models; an empty list: of none, and nothing is found.
        limit: checkpoints a page, 1 to 200.
        cursor: of the page before.
    """

    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = Field(default_factory=dict)
    checkpoint_type: CheckpointType | None = None
    owner: SearchOwner = Field(default_factory=OwnSearchOwner)
    base_models: list[str] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: CheckpointSearchCursor | None = None


class CheckpointSearchResponse(Response):
    """A page of results, newest first; ``next_cursor`` None: the last one."""

    checkpoints: list[Checkpoint]
    next_cursor: CheckpointSearchCursor | None = None
