"""Sessions, listed and searched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from everstep.cli.common import output
from everstep.cli.common.errors import WrongUsage
from everstep.cli.common.filters import read_pair
from everstep.cli.common.target import Reader, Target
from everstep.client import RestClient
from everstep.client._transport.errors import APIStatusError, ExperimentalWarning
from everstep.wire import types

_NO_ROUTE = (404, 405)
_PAGE_SIZE = 200
_ID_PAGE_SIZE = 100
_FINISHED = ("success", "errored", "interrupted")
_HEADERS = ("opened", "status", "checkpoints", "size", "project", "name", "session")


def search_request(
    words: str | None, projects: Sequence[str], metadata: Sequence[str], statuses: Sequence[str]
) -> types.SessionSearchRequest:
    """Build a search request.

    Args:
        words: words of the display name.
        projects: projects of the sessions.
        metadata: ``KEY=VALUE`` entries of user_metadata.
        statuses: statuses of the sessions.

    Raises:
        WrongUsage: an entry or a status is malformed.
    """
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
                f"{each!r} is not a status; give one of active, failed, cancelled, "
                f"{', '.join(_FINISHED)}."
            )
    return types.SessionSearchRequest.model_validate(
        {
            "display_name": words or None,
            "project_ids": list(projects) or None,
            "user_metadata": pairs,
            "statuses": wanted or None,
            "limit": _PAGE_SIZE,
        }
    )


def print_all(target: Target, limit: int) -> None:
    """Print the newest sessions. Only their ids if the service can't search."""
    with target.reader() as service:
        try:
            found, more = _search(service, search_request(None, [], [], []), limit)
        except APIStatusError as error:
            if error.status_code not in _NO_ROUTE:
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
    _report_more(len(ids), more)


def print_matching(target: Target, wanted: types.SessionSearchRequest, limit: int) -> None:
    """Print the sessions that match a search. Raises `NotOffered`."""
    with target.reader() as service:
        with service.optional("searching sessions"):
            found, more = _search(service, wanted, limit)
        _print(target, found, more)


def _search(
    service: Reader, wanted: types.SessionSearchRequest, limit: int
) -> tuple[list[types.SessionSummary], bool]:
    """Return the first ``limit`` sessions (0: all), and whether there are more."""
    found: list[types.SessionSummary] = []
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            page = service.rest.search_sessions(wanted).result()
        found += page.sessions
        if page.next_cursor is None or _is_cut(found, limit):
            return found[: limit or None], _is_cut(found, limit)
        wanted = wanted.model_copy(update={"cursor": page.next_cursor})


def _ids(rest: RestClient, limit: int) -> tuple[list[str], bool]:
    found: list[str] = []
    while True:
        page = rest.list_sessions(_ID_PAGE_SIZE, len(found)).result().sessions
        found += page
        if len(page) < _ID_PAGE_SIZE or _is_cut(found, limit):
            return found[: limit or None], _is_cut(found, limit)


def _is_cut(found: Sequence[object], limit: int) -> bool:
    """Return whether a limit cuts a list, or 0 for no limit."""
    return 0 < limit < len(found)


def _report_more(shown: int, more: bool) -> None:
    if more:
        output.messages().print(f"The newest {shown:,}; --limit 0 shows all.")


def _print(target: Target, found: Sequence[types.SessionSummary], more: bool) -> None:
    if target.as_json:
        sessions = [each.model_dump(mode="json") for each in found]
        output.print_json({"sessions": sessions, "more": more})
        return
    rows = [
        (
            output.ago_text(each.created_at),
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
    _report_more(len(found), more)


def _status(session: types.SessionSummary) -> str:
    status = session.status
    if isinstance(status, types.ClientSessionFinished):
        return status.reason.type
    return "" if status is None else status.type
