"""Session queries: lists and details of sessions, and their projects."""

from __future__ import annotations

from typing import Any, get_args

from everstep.ledger import Event, Ledger, Session, SessionQuery, StorageUsage, as_strings
from everstep.runtime.absence import absent
from everstep.runtime.authorization import OWNER
from everstep.runtime.queries.rows import servable, servable_one
from everstep.wire import types

NO_PROJECT = "default"
"""The project id, in searches, of sessions that were opened without one."""


class SessionQueries:
    """Reads sessions from the ledger, as wire types."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def sessions(self, limit: int, offset: int) -> types.ListSessionsResponse:
        """Return a page of session ids, newest first."""
        found = await self._ledger.search.list_sessions(limit, offset)
        return types.ListSessionsResponse(sessions=[each.session_id for each in found])

    async def session(self, session_id: str) -> types.GetSessionResponse:
        """Return a session's runs and samplers, or raise `Rejected` (404)."""
        session = await self._ledger.session(session_id)
        if session is None:
            raise await absent(self._ledger, session_id, f"Session {session_id} does not exist.")
        runs, samplers = await self._ledger.search.session_members(session_id)
        built = types.GetSessionResponse(
            training_run_ids=runs,
            sampler_ids=samplers,
            user_metadata=session.user_metadata,
            display_name=session.display_name,
        )
        return servable_one(built, f"session {session_id}")

    async def assign(self, session_id: str, project_id: str) -> None:
        """Move a session into a project, or raise `Rejected` (404) if it does not exist."""
        details = {"session_id": session_id, "project_id": project_id}
        moved = Event("project_session_assign", OWNER, details=details)
        if not await self._ledger.search.assign_project(session_id, project_id, moved):
            raise await absent(self._ledger, session_id, f"Session {session_id} does not exist.")

    async def search(self, request: types.SessionSearchRequest) -> types.SessionSearchResponse:
        """Return a page of the sessions that match a search, newest first."""
        cursor, owner = request.cursor, request.owner
        finished = _finished(request.statuses)
        if not owned_by(owner) or finished == []:
            return types.SessionSearchResponse(sessions=[])
        found = await self._ledger.search.search_sessions(
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
        stored = await self._ledger.search.storage_by_session([each.session_id for each in page])
        last = None
        if len(found) > request.limit:
            last = types.SessionSearchCursor(
                last_created_at=page[-1].created_at, last_session_id=page[-1].session_id
            )
        return types.SessionSearchResponse(
            sessions=servable(
                page,
                lambda each: _summary(each, stored.get(each.session_id)),
                lambda each: each.session_id,
            ),
            next_cursor=last,
        )


def _finished(statuses: list[Any] | None) -> list[str | None] | None:
    """Return the end reasons that a search matches, None among them for active sessions.

    None instead of a list matches all. Only operations fail or are cancelled here, not sessions.
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
    """Return whether a search by owner can match anything in this service."""
    return not isinstance(owner, types.UserSearchOwner) or OWNER in owner.owner_urns


def projects(project_ids: list[str] | None) -> list[str | None] | None:
    """Return the projects that a search matches, None among them for sessions without one.

    None instead of a list matches all.
    """
    if project_ids is None:
        return None
    return [*project_ids, *([None] if NO_PROJECT in project_ids else [])]


def _summary(session: Session, stored: StorageUsage | None) -> types.SessionSummary:
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
            "user_metadata": as_strings(session.user_metadata),
            "checkpoint_storage_bytes": stored.size_bytes if stored else 0,
        }
    )
