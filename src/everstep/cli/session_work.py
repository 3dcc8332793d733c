"""What ``everstep session`` does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from everstep.cli import output
from everstep.cli.checkpoint_marks import read_pair
from everstep.cli.errors import NotFound, Refused, WrongUsage
from everstep.cli.target import Service, Target
from everstep.client import RestClient
from everstep.client._errors import APIStatusError, NotFoundError
from everstep.client._experimental import ExperimentalWarning
from everstep.wire import types

_ROUTES = (404, 405)
_AT_ONCE = 200
_IDS_AT_ONCE = 100
_FINISHED = ("success", "errored", "interrupted")
_HEADERS = ("opened (UTC)", "status", "checkpoints", "size", "project", "name", "session")


def request(
    words: str | None, projects: Sequence[str], metadata: Sequence[str], statuses: Sequence[str]
) -> types.SessionSearchRequest:
    """A search as it was typed; raises `WrongUsage`."""
    pairs = dict(read_pair(each) for each in metadata)
    wanted: list[dict[str, Any]] = []
    reasons = [each for each in statuses if each in _FINISHED]
    if reasons:
        wanted.append({"type": "client_finished", "reasons": reasons})
    for each in statuses:
        if each in ("active", "failed", "cancelled"):
            wanted.append({"type": each})
        elif each not in _FINISHED:
            raise WrongUsage(
                f"{each!r} is no status; give one of active, failed, cancelled, "
                f"{', '.join(_FINISHED)}."
            )
    return types.SessionSearchRequest.model_validate(
        {
            "display_name": words or None,
            "project_ids": list(projects) or None,
            "user_metadata": pairs,
            "statuses": wanted or None,
            "limit": _AT_ONCE,
        }
    )


def show_all(target: Target, limit: int) -> None:
    """Print the newest sessions; their ids alone, of a service that can't search."""
    with target.service() as service:
        try:
            found, more = _found(service, request(None, [], [], []), limit)
        except APIStatusError as error:
            if error.status_code not in _ROUTES:
                raise
            ids, more = _ids(service.rest, limit)
        else:
            _print(target, found, more)
            return
    if target.as_json:
        output.print_json({"sessions": [{"session_id": each} for each in ids], "more": more})
        return
    for each in ids:
        print(each)
    _tell_more(len(ids), more)


def show_found(target: Target, wanted: types.SessionSearchRequest, limit: int) -> None:
    """Print the sessions that meet a search."""
    with target.service() as service:
        with service.optional("searching sessions"):
            found, more = _found(service, wanted, limit)
        _print(target, found, more)


def _found(
    service: Service, wanted: types.SessionSearchRequest, limit: int
) -> tuple[list[types.SessionSummary], bool]:
    """The first so many, and whether there are more."""
    found: list[types.SessionSummary] = []
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            page = service.rest.search_sessions(wanted).result()
        found += page.sessions
        if page.next_cursor is None or _beyond(found, limit):
            return found[: limit or None], _beyond(found, limit)
        wanted = wanted.model_copy(update={"cursor": page.next_cursor})


def _ids(rest: RestClient, limit: int) -> tuple[list[str], bool]:
    found: list[str] = []
    while True:
        page = rest.list_sessions(_IDS_AT_ONCE, len(found)).result().sessions
        found += page
        if len(page) < _IDS_AT_ONCE or _beyond(found, limit):
            return found[: limit or None], _beyond(found, limit)


def _beyond(found: Sequence[object], limit: int) -> bool:
    """Whether there are more than are to be shown; 0: all are."""
    return 0 < limit < len(found)


def _tell_more(shown: int, more: bool) -> None:
    if more:
        output.messages().print(f"The newest {shown:,}; --limit 0 shows all.")


def _print(target: Target, found: Sequence[types.SessionSummary], more: bool) -> None:
    if target.as_json:
        sessions = [each.model_dump(mode="json") for each in found]
        output.print_json({"sessions": sessions, "more": more})
        return
    rows = [
        (
            output.time_text(each.created_at),
            _status(each),
            str(each.checkpoints_count or ""),
            output.size_text(each.checkpoint_storage_bytes or None),
            each.project_id,
            each.display_name or "",
            each.session_id,
        )
        for each in found
    ]
    output.print_listing(_HEADERS, rows, len(found), "session")
    _tell_more(len(found), more)


def _status(session: types.SessionSummary) -> str:
    status = session.status
    if isinstance(status, types.ClientSessionFinished):
        return status.reason.type
    return "" if status is None else status.type


def show(target: Target, session_id: str) -> None:
    """Print one session."""
    with target.service() as service:
        session = _there(service, session_id)
    if target.as_json:
        output.print_json({"session_id": session_id, **session.model_dump(mode="json")})
        return
    metadata = session.user_metadata or {}
    output.print_facts(
        [
            ("session", session_id),
            ("name", session.display_name),
            *(("run", each) for each in session.training_run_ids),
            *(("sampler", each) for each in session.sampler_ids),
            *((f"· {key}", str(value)) for key, value in metadata.items()),
        ]
    )


def finish(target: Target, session_id: str, reason: str, yes: bool) -> None:
    """End a session, once a person said so."""
    if target.as_json and not yes:
        raise WrongUsage("--json asks no question: give --yes with it.")
    with target.service() as service:
        runs = _there(service, session_id).training_run_ids
        question = f"End the session? {output.counted(len(runs), 'run')} of it will take no more."
        if not yes:
            output.agree(question, "The session was not ended.")
        body = {"reason": {"type": reason}, "detail": "ended by 'everstep session finish'"}
        service.rest._do("POST", f"/sessions/{session_id}/finish", json=body).result()
    if target.as_json:
        output.print_json({"session_id": session_id, "reason": reason})
    else:
        output.console().print(f"Session {session_id} is finished: {reason}.")


def move(target: Target, session_id: str, project: str) -> None:
    """Move a session into a project."""
    with target.service() as service:
        _there(service, session_id)
        with service.optional("moving sessions"):
            service.rest.assign_session_project(session_id, project).result()
    if target.as_json:
        output.print_json({"session_id": session_id, "project_id": project})
    else:
        output.console().print(f"Session {session_id} is in project {project}.")


def export_trace(target: Target, session_id: str, file: Path | None, url_only: bool) -> None:
    """Fetch a session's time line, or say where it can be fetched."""
    path = file or Path(f"{session_id}.trace.json")
    with target.service() as service:
        _there(service, session_id)
        with service.optional("time lines of sessions"):
            url = service.rest.export_session_trace(session_id).result()
        if not url_only:
            answer = httpx.get(url, follow_redirects=True, timeout=60.0)
            if not answer.is_success:
                raise Refused(f"{url} answered {answer.status_code}: {answer.text[:300]}")
            path.write_bytes(answer.content)
    if target.as_json:
        output.print_json({"url": url, "file": None if url_only else str(path)})
    elif url_only:
        print(url)
    else:
        output.console().print(f"{path}: open it at https://ui.perfetto.dev")


def _there(service: Service, session_id: str) -> types.GetSessionResponse:
    try:
        return service.rest.get_session(session_id).result()
    except NotFoundError as error:
        raise NotFound(
            f"There is no session {session_id}. 'everstep session list' lists those that are there."
        ) from error
