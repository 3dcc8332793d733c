"""What the service tells of sessions, and which project they belong to."""

from __future__ import annotations

from typing import Any, get_args

from everstep.ledger import Event, Ledger, Session, SessionQuery, Stored, as_texts
from everstep.runtime.access import OWNER
from everstep.runtime.errors import Rejected
from everstep.wire import types

NO_PROJECT = "default"
"""What a search calls the project of a session that was opened without one."""


class SessionViews:
    """Answers about sessions, in the wire's types."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def sessions(self, limit: int, offset: int) -> types.ListSessionsResponse:
        """A page of ids, newest first."""
        found = await self._ledger.directory.sessions(limit, offset)
        return types.ListSessionsResponse(sessions=[each.session_id for each in found])

    async def session(self, session_id: str) -> types.GetSessionResponse:
        """One session's runs and samplers; raises `Rejected` (404) for an unknown one."""
        session = await self._ledger.session(session_id)
        if session is None:
            raise _unknown(session_id)
        runs, samplers = await self._ledger.directory.members(session_id)
        return types.GetSessionResponse(
            training_run_ids=runs,
            sampler_ids=samplers,
            user_metadata=session.user_metadata,
            display_name=session.display_name,
        )

    async def assign(self, session_id: str, project_id: str) -> None:
        """Move a session into a project; raises `Rejected` (404) for an unknown one."""
        details = {"session_id": session_id, "project_id": project_id}
        moved = Event("project_session_assign", OWNER, details=details)
        if not await self._ledger.directory.assign(session_id, project_id, moved):
            raise _unknown(session_id)

    async def search(self, request: types.SessionSearchRequest) -> types.SessionSearchResponse:
        """A page of the sessions that meet a search, newest first."""
        cursor, owner = request.cursor, request.owner
        finished = _finished(request.statuses)
        if not owned_by(owner) or finished == []:
            return types.SessionSearchResponse(sessions=[])
        found = await self._ledger.directory.search(
            SessionQuery(
                session_id=request.session_id,
                words=(request.display_name or "").split(),
                project_ids=projects(request.project_ids),
                user_metadata=request.user_metadata,
                finished=finished,
                before=(cursor.last_created_at, cursor.last_session_id) if cursor else None,
                limit=request.limit + 1,
            )
        )
        page = found[: request.limit]
        stored = await self._ledger.directory.stored_by([each.session_id for each in page])
        last = None
        if len(found) > request.limit:
            last = types.SessionSearchCursor(
                last_created_at=page[-1].created_at, last_session_id=page[-1].session_id
            )
        return types.SessionSearchResponse(
            sessions=[_summary(each, stored.get(each.session_id)) for each in page],
            next_cursor=last,
        )


def _finished(statuses: list[Any] | None) -> list[str | None] | None:
    """The ways to have ended that a search wants; None among them: not ended. None: whichever.

    Sessions don't fail here and nobody cancels them: their operations do.
    """
    if statuses is None:
        return None
    wanted: list[str | None] = []
    for status in statuses:
        if isinstance(status, types.ActiveSessionStatusQuery):
            wanted.append(None)
        elif isinstance(status, types.ClientFinishedSessionStatusQuery):
            wanted += status.reasons or get_args(types.ClientSessionFinishReasonType)
    return wanted


def owned_by(owner: types.SearchOwner) -> bool:
    """Whether a search for what is somebody's looks at what is here."""
    return not isinstance(owner, types.UserSearchOwner) or OWNER in owner.owner_urns


def projects(project_ids: list[str] | None) -> list[str | None] | None:
    """The projects that a search wants; None among them: no project. None: whichever."""
    if project_ids is None:
        return None
    return [*project_ids, *([None] if NO_PROJECT in project_ids else [])]


def _summary(session: Session, stored: Stored | None) -> types.SessionSummary:
    status: dict[str, Any] = {"type": "active"}
    if session.finished is not None:
        reason = {"type": session.finished}
        status = {"type": "client_finished", "reason": reason, "detail": session.detail}
    return types.SessionSummary.model_validate(
        {
            "session_id": session.session_id,
            "created_at": session.created_at,
            "owner": OWNER,
            "project_id": session.project_id or NO_PROJECT,
            "status": status,
            "checkpoints_count": stored.count if stored else 0,
            "display_name": session.display_name,
            "user_metadata": as_texts(session.user_metadata),
            "checkpoint_storage_bytes": stored.size_bytes if stored else 0,
        }
    )


def _unknown(session_id: str) -> Rejected:
    return Rejected(404, f"Session {session_id} does not exist.")
