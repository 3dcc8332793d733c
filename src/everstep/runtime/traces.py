"""Traces: a session's time line, as a file that Perfetto and Chrome's tracing page open.

Every operation of the session is a span from when it was accepted to when it was finished, on the
track of its run or sampler; within it lies the time for which the worker executed it.
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

from everstep.ledger import Ledger, Session, Span
from everstep.runtime.errors import Rejected
from everstep.runtime.links import Links

LINK_SECONDS = 3600.0
_PATIENCE_SECONDS = 2.0
_NAME = re.compile(r"[0-9a-f]{64}\.json")


class Traces:
    """Draws time lines, and keeps each for as long as its link works.

    Args:
        directory: where the files lie.
        ledger: has the operations.
        links: signs the addresses.
    """

    def __init__(self, directory: Path, ledger: Ledger, links: Links) -> None:
        self._directory = directory
        self._ledger = ledger
        self._links = links
        self._building: dict[str, asyncio.Task[str]] = {}

    async def close(self) -> None:
        """Stop; what was not drawn is drawn when it is asked for again."""
        for task in self._building.values():
            task.cancel()
        await asyncio.gather(*self._building.values(), return_exceptions=True)

    async def export(self, session_id: str) -> str | None:
        """Draw a session's time line; one that is up to date is not drawn again.

        Returns:
            The file's name, for `link` and `file`; None while it is being drawn: ask again.

        Raises:
            Rejected: there is no such session (404).
            OSError: it can't be written.
        """
        session = await self._ledger.session(session_id)
        if session is None:
            raise Rejected(404, f"Session {session_id} does not exist.")
        task = self._building.get(session_id)
        if task is None:
            task = asyncio.create_task(self._draw(session), name=f"trace {session_id}")
            self._building[session_id] = task
        done, _ = await asyncio.wait([task], timeout=_PATIENCE_SECONDS)
        if not done:
            return None
        self._building.pop(session_id, None)
        return task.result()

    def link(self, name: str) -> dict[str, str]:
        """The query parameters with which a file can be fetched, for an hour."""
        return self._links.sign(f"trace {name}", LINK_SECONDS)

    def file(self, name: str, expires: str, signature: str) -> Path:
        """The file of a link; raises `Rejected` (403, 404)."""
        self._links.check(f"trace {name}", expires, signature)
        path = self._directory / name
        if not _NAME.fullmatch(name) or not path.is_file():
            raise Rejected(404, "This trace is kept no longer; export it again.")
        return path

    async def _draw(self, session: Session) -> str:
        spans = await self._ledger.directory.spans(session.session_id)
        return await asyncio.to_thread(self._write, session, spans)

    def _write(self, session: Session, spans: list[Span]) -> str:
        version = hashlib.sha256(repr((session, spans)).encode()).hexdigest()
        name = f"{version}.json"
        path = self._directory / name
        self._directory.mkdir(exist_ok=True)
        self._forget_old()
        if path.exists():
            os.utime(path)
        else:
            temporary = path.with_suffix(".drawing")
            with temporary.open("w") as file:
                json.dump(trace(session, spans), file)
            temporary.replace(path)
        return name

    def _forget_old(self) -> None:
        for path in self._directory.iterdir():
            if time.time() - path.stat().st_mtime > 2 * LINK_SECONDS:
                path.unlink(missing_ok=True)


def trace(session: Session, spans: Iterable[Span]) -> dict[str, Any]:
    """A session's time line in the trace event format."""
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
        events += _drawn(span, number, tracks[span.scope], now)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _drawn(span: Span, number: int, track: int, now: datetime) -> list[dict[str, Any]]:
    """An operation's span, and in it the time for which it was executed."""
    arguments = {
        "type": span.kind,
        "seq_id": span.place,
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
        events.append({**executed, **begin, "args": {"seq_id": span.place}})
    return events


def _named(what: str, name: str, track: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}


def _at(moment: datetime, track: int) -> dict[str, Any]:
    return {"ts": _microseconds(moment), "pid": 1, "tid": track}


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)
