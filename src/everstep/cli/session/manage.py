"""One session: its details, its end, its project and its timeline."""

from __future__ import annotations

from pathlib import Path

import httpx

from everstep.addresses import route, without_proxies
from everstep.cli.common import names, output
from everstep.cli.common.errors import Refused, WrongUsage
from everstep.cli.common.target import Reader, Target
from everstep.client._transport.errors import NotFoundError
from everstep.wire import types


def print_session(target: Target, session_id: str) -> None:
    """Print one session. Raises `NotFound`."""
    with target.reader() as service:
        session_id, session = _find(service, session_id)
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


def finish_session(target: Target, session_id: str, reason: str, yes: bool) -> None:
    """End a session after a confirmation.

    Args:
        target: the service.
        session_id: the session.
        reason: how it ended.
        yes: skip the confirmation.

    Raises:
        WrongUsage: JSON is wanted, which allows no question, without ``yes``.
        NotFound: there is no such session.
        Refused: the answer was no.
    """
    if target.as_json and not yes:
        raise WrongUsage("--json asks no questions: give --yes with it.")
    with target.service() as service:
        session_id, session = _find(service, session_id)
        runs = session.training_run_ids
        question = (
            f"End the session? {output.counted(len(runs), 'run')} will accept no more operations."
        )
        if not yes:
            output.confirm(question, "The session was not ended.")
        body = {"reason": {"type": reason}, "detail": "ended by 'everstep session finish'"}
        service.rest.holder.do("POST", route("sessions", session_id, "finish"), json=body).result()
    if target.as_json:
        output.print_json({"session_id": session_id, "reason": reason})
    else:
        output.console().print(f"Session {session_id} is finished: {reason}.")


def move_session(target: Target, session_id: str, project: str) -> None:
    """Move a session to a project. Raises `NotFound`."""
    with target.service() as service:
        session_id, _ = _find(service, session_id)
        with service.optional("moving sessions"):
            service.rest.assign_session_project(session_id, project).result()
    if target.as_json:
        output.print_json({"session_id": session_id, "project_id": project})
    else:
        output.console().print(f"Session {session_id} is in project {project}.")


def download_trace(target: Target, session_id: str, file: Path | None, url_only: bool) -> None:
    """Download a session's timeline.

    Args:
        target: the service.
        session_id: the session.
        file: where to write it, or None for ``SESSION.trace.json``.
        url_only: print the address instead.

    Raises:
        NotFound: there is no such session.
        Refused: the timeline can't be fetched.
    """
    with target.service() as service:
        session_id, _ = _find(service, session_id)
        path = file or Path(f"{session_id}.trace.json")
        with service.optional("timelines of sessions"):
            url = service.rest.export_session_trace(session_id).result()
        if not url_only:
            with httpx.Client(
                follow_redirects=True, timeout=60.0, mounts=without_proxies(url)
            ) as client:
                answer = client.get(url)
            if not answer.is_success:
                raise Refused(f"{url} answered {answer.status_code}: {answer.text[:300]}")
            path.write_bytes(answer.content)
    if target.as_json:
        output.print_json({"url": url, "file": None if url_only else str(path)})
    elif url_only:
        print(url)
    else:
        output.console().print(f"{path}: open it at https://ui.perfetto.dev")


def _find(service: Reader, text: str) -> tuple[str, types.GetSessionResponse]:
    """Return the session that a text means, with its id. Raises as `names.session_id` does."""
    try:
        return text, service.rest.get_session(text).result()
    except NotFoundError:
        known = names.session_id(service.rest, text)
        return known, service.rest.get_session(known).result()
