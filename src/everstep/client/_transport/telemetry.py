"""Telemetry: sends a client's events to its service in batches.

``TINKER_TELEMETRY=0`` turns it off. It never disturbs the client: events that can't be sent are
dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import threading
import traceback
import uuid
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from everstep._version import __version__
from everstep.client._transport.errors import APIStatusError, RequestFailedError, TinkerError
from everstep.client._transport.http import Http
from everstep.wire import types
from everstep.wire.errors import ErrorCategory

_log = logging.getLogger("everstep.client")
_BATCH_SIZE = 100
_MAX_QUEUED = 10_000
_FLUSH_SECONDS = 10.0
_TIMEOUT_SECONDS = 5.0
_PROCESS = str(uuid.uuid4())


def enabled() -> bool:
    """Return whether telemetry is on, as it is unless ``TINKER_TELEMETRY`` says otherwise."""
    return os.environ.get("TINKER_TELEMETRY", "1").lower() in ("1", "true", "yes", "on")


class Telemetry:
    """Collects the events of one session and sends them.

    Args:
        http: the service.
        session_id: of the session.
    """

    def __init__(self, http: Http, session_id: str) -> None:
        self._http = http
        self._session_id = session_id
        self._begin = datetime.now(UTC)
        self._events: deque[types.TelemetryEvent] = deque(maxlen=_MAX_QUEUED)
        self._count = 0
        self._lock = threading.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start sending every ten seconds. Called on the client's event loop."""
        self._add(types.SessionStartEvent(**self._head("SESSION_START", "INFO")))
        self._task = asyncio.create_task(self._flush_periodically())

    async def stop(self) -> None:
        """Send the remaining events and the session's end."""
        if self._task is not None:
            self._task.cancel()
        duration = str(datetime.now(UTC) - self._begin)
        self._add(types.SessionEndEvent(**self._head("SESSION_END", "INFO"), duration=duration))
        await self.flush()

    def log(
        self,
        event_name: str,
        event_data: dict[str, Any] | None = None,
        severity: types.Severity = "INFO",
    ) -> bool:
        """Queue an event.

        Args:
            event_name: from a small set of names.
            event_data: JSON.
            severity: of the event.

        Returns:
            True.
        """
        head = self._head("GENERIC_EVENT", severity)
        self._add(types.GenericEvent(**head, event_name=event_name, event_data=event_data or {}))
        return True

    def log_exception_sync(
        self, exception: BaseException, severity: types.Severity = "ERROR"
    ) -> bool:
        """Queue an exception. An error that the user caused is sent without its traceback."""
        kind = type(exception).__name__
        if _is_user_error(exception):
            data = {"error_type": kind, "message": str(exception)}
            return self.log("user_error", data, "WARNING")
        self._add(
            types.UnhandledExceptionEvent(
                **self._head("UNHANDLED_EXCEPTION", severity),
                error_type=kind,
                error_message=str(exception),
                traceback="".join(traceback.format_exception(exception)),
            )
        )
        return True

    async def flush(self) -> None:
        """Send all queued events."""
        while batch := self._next_batch():
            body = types.TelemetryBatch(
                events=batch,
                platform=platform.system(),
                sdk_version=__version__,
                session_id=self._session_id,
                process_uuid=_PROCESS,
            )
            try:
                await self._http.send(
                    "POST",
                    "/telemetry",
                    json=body.model_dump(mode="json", exclude_none=True),
                    timeout=_TIMEOUT_SECONDS,
                )
            except TinkerError as error:
                _log.debug("telemetry not sent: %s", error)
                return

    async def _flush_periodically(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush()

    def _add(self, event: types.TelemetryEvent) -> None:
        with self._lock:
            self._events.append(event)

    def _next_batch(self) -> Sequence[types.TelemetryEvent]:
        with self._lock:
            return [self._events.popleft() for _ in range(min(_BATCH_SIZE, len(self._events)))]

    def _head(self, event: types.EventType, severity: types.Severity) -> dict[str, Any]:
        with self._lock:
            self._count += 1
            index = self._count - 1
        return {
            "event": event,
            "event_id": str(uuid.uuid4()),
            "event_session_index": index,
            "severity": severity,
            "timestamp": datetime.now(UTC),
        }


def _is_user_error(error: BaseException | None) -> bool:
    if isinstance(error, RequestFailedError):
        return error.category == ErrorCategory.USER
    if isinstance(error, APIStatusError):
        return 400 <= error.status_code < 500 and error.status_code != 408
    return error is not None and _is_user_error(error.__cause__)
