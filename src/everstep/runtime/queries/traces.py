"""Traces: the timeline of a session, as a file for Perfetto and Chrome's tracing page.

Every operation of the session is a span from its acceptance to its end, on the track of its run or
sampler. The time for which the worker executed it is a span inside.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from everstep.durable_files import replace_file, sync_directory
from everstep.ledger import OperationSpan, Session
from everstep.runtime.absence import absent
from everstep.runtime.checkpoints.signed_urls import SignedUrls
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import Rejected

LINK_SECONDS = 3600.0
_DIRECTORY = "traces"
_WAIT_SECONDS = 2.0
_NAME = re.compile(r"[0-9a-f]{64}\.json")


class Traces:
    """Writes timelines, and keeps each for as long as its URL is valid.

    Args:
        context: the service's home, which holds the files, and its ledger.
        links: signs the URLs.
    """

    def __init__(self, context: RuntimeContext, links: SignedUrls) -> None:
        self._directory = context.home / _DIRECTORY
        self._ledger = context.ledger
        self._links = links
        self._building: dict[str, asyncio.Task[str]] = {}

    async def close(self) -> None:
        """Stop. Unfinished traces are written when they are requested again."""
        for task in self._building.values():
            task.cancel()
        await asyncio.gather(*self._building.values(), return_exceptions=True)

    async def export(self, session_id: str) -> str | None:
        """Write a session's timeline, unless an up-to-date one exists.

        Returns:
            The file's name, for `link` and `file`. None while it is being written: call again.

        Raises:
            Rejected: there is no such session (404).
            OSError: the file can't be written.
        """
        session = await self._ledger.session(session_id)
        if session is None:
            raise await absent(self._ledger, session_id, f"Session {session_id} does not exist.")
        task = self._building.get(session_id)
        if task is None:
            task = asyncio.create_task(self._export(session), name=f"trace {session_id}")
            self._building[session_id] = task
        done, _ = await asyncio.wait([task], timeout=_WAIT_SECONDS)
        if not done:
            return None
        self._building.pop(session_id, None)
        return task.result()

    async def remove(self, ids: Iterable[str]) -> None:
        """Remove the files that mention sessions, runs or samplers which were deleted."""
        await asyncio.to_thread(self._remove, [json.dumps(each).encode() for each in ids])

    def _remove(self, mentioned: list[bytes]) -> None:
        for path in self._directory.glob("*.json"):
            content = path.read_bytes()
            if any(each.strip(b'"') in content for each in mentioned):
                path.unlink(missing_ok=True)

    def link(self, name: str) -> dict[str, str]:
        """Return the query parameters with which a file can be fetched for an hour."""
        return self._links.sign(f"trace {name}", LINK_SECONDS)

    def file(self, name: str, expires: str, signature: str) -> Path:
        """Return the file of a URL, or raise `Rejected` (403, 404)."""
        self._links.check(f"trace {name}", expires, signature)
        path = self._directory / name
        if not _NAME.fullmatch(name) or not path.is_file():
            raise Rejected(404, "This trace is kept no longer; export it again.")
        return path

    async def _export(self, session: Session) -> str:
        spans = await self._ledger.search.operation_spans(session.session_id)
        return await asyncio.to_thread(self._write, session, spans)

    def _write(self, session: Session, spans: list[OperationSpan]) -> str:
        version = hashlib.sha256(repr((session, spans)).encode()).hexdigest()
        name = f"{version}.json"
        path = self._directory / name
        self._directory.mkdir(exist_ok=True)
        sync_directory(self._directory.parent)
        self._remove_old()
        if path.exists():
            os.utime(path)
        else:
            replace_file(path, json.dumps(trace(session, spans)).encode())
        return name

    def _remove_old(self) -> None:
        for path in self._directory.iterdir():
            if time.time() - path.stat().st_mtime > 2 * LINK_SECONDS:
                path.unlink(missing_ok=True)


def trace(session: Session, spans: Iterable[OperationSpan]) -> dict[str, Any]:
    """Return a session's timeline in the trace event format."""
    now = datetime.now(UTC)
    tracks: dict[str, int] = {}
    events: list[dict[str, Any]] = [
        _named("process_name", f"session {session.session_id}", 0),
        {"name": "session opened", "ph": "i", "s": "p", **_at(session.created_at, 0)},
    ]
    if session.finished_at is not None:
        name = f"session finished: {session.finished}"
        events.append({"name": name, "ph": "i", "s": "p", **_at(session.finished_at, 0)})
    for number, span in enumerate(spans, start=1):
        if span.scope not in tracks:
            tracks[span.scope] = len(tracks) + 1
            events.append(_named("thread_name", span.scope, tracks[span.scope]))
        events += _span_events(span, number, tracks[span.scope], now)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _span_events(
    span: OperationSpan, number: int, track: int, now: datetime
) -> list[dict[str, Any]]:
    """Return the events of an operation's span and of its execution."""
    arguments = {
        "type": span.kind,
        "seq_id": span.seq_id,
        "status": span.status,
        "request_id": span.request_id,
        "accepted_at": span.accepted_at.isoformat(),
        "finished_at": span.finished_at.isoformat() if span.finished_at else None,
        "executed_seconds": span.seconds,
        "error": span.error,
    }
    end = span.finished_at or now
    common = {"cat": "operation", "id": number, "name": span.kind}
    events: list[dict[str, Any]] = [
        {**common, "ph": "b", **_at(span.accepted_at, track), "args": arguments},
        {**common, "ph": "e", **_at(max(end, span.accepted_at), track)},
    ]
    if span.seconds:
        duration = round(span.seconds * 1e6)
        begin = {"ts": _microseconds(end) - duration, "pid": 1, "tid": track}
        executed = {"name": span.kind, "cat": "executed", "ph": "X", "dur": duration}
        events.append({**executed, **begin, "args": {"seq_id": span.seq_id}})
    return events


def _named(what: str, name: str, track: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}


def _at(moment: datetime, track: int) -> dict[str, Any]:
    return {"ts": _microseconds(moment), "pid": 1, "tid": track}


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)
