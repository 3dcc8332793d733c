"""Telemetry: a client's events, told to its service in batches.

Off with ``TINKER_TELEMETRY=0``. Nothing here may disturb the client: what can't be sent is dropped.
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

from everstep.client._errors import APIStatusError, RequestFailedError, TinkerError
from everstep.client._http import Http
from everstep.client._version import VERSION
from everstep.wire.errors import ErrorCategory
from everstep.wire.telemetry import (
    EventType,
    GenericEvent,
    SessionEndEvent,
    SessionStartEvent,
    Severity,
    TelemetryBatch,
    TelemetryEvent,
    UnhandledExceptionEvent,
)

_log = logging.getLogger("everstep.client")
_BATCH = 100
_LONGEST_QUEUE = 10_000
_FLUSH_SECONDS = 10.0
_TIMEOUT_SECONDS = 5.0
_PROCESS = str(uuid.uuid4())


def enabled() -> bool:
    """Whether ``TINKER_TELEMETRY`` allows it; it does when it isn't set."""
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
        self._events: deque[TelemetryEvent] = deque(maxlen=_LONGEST_QUEUE)
        self._count = 0
        self._lock = threading.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send, every ten seconds; called on the client's loop."""
        self._add(SessionStartEvent(**self._head("SESSION_START", "INFO")))
        self._task = asyncio.create_task(self._send_from_time_to_time())

    async def stop(self) -> None:
        """Send what is left, with the session's end."""
        if self._task is not None:
            self._task.cancel()
        duration = str(datetime.now(UTC) - self._begin)
        self._add(SessionEndEvent(**self._head("SESSION_END", "INFO"), duration=duration))
        await self.flush()

    def log(
        self, event_name: str, event_data: dict[str, Any] | None = None, severity: Severity = "INFO"
    ) -> bool:
        """Tell the service of something.

        Args:
            event_name: one of few.
            event_data: JSON.
            severity: how grave it is.

        Returns:
            True.
        """
        head = self._head("GENERIC_EVENT", severity)
        self._add(GenericEvent(**head, event_name=event_name, event_data=event_data or {}))
        return True

    def log_exception_sync(self, exception: BaseException, severity: Severity = "ERROR") -> bool:
        """Tell the service of an exception; one that is the user's fault without its traceback."""
        kind = type(exception).__name__
        if _by_user(exception):
            data = {"error_type": kind, "message": str(exception)}
            return self.log("user_error", data, "WARNING")
        self._add(
            UnhandledExceptionEvent(
                **self._head("UNHANDLED_EXCEPTION", severity),
                error_type=kind,
                error_message=str(exception),
                traceback="".join(traceback.format_exception(exception)),
            )
        )
        return True

    async def flush(self) -> None:
        """Send what is there."""
        while batch := self._take():
            body = TelemetryBatch(
                events=batch,
                platform=platform.system(),
                sdk_version=VERSION,
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

    async def _send_from_time_to_time(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush()

    def _add(self, event: TelemetryEvent) -> None:
        with self._lock:
            self._events.append(event)

    def _take(self) -> Sequence[TelemetryEvent]:
        with self._lock:
            return [self._events.popleft() for _ in range(min(_BATCH, len(self._events)))]

    def _head(self, event: EventType, severity: Severity) -> dict[str, Any]:
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


def _by_user(error: BaseException | None) -> bool:
    if isinstance(error, RequestFailedError):
        return error.category == ErrorCategory.USER
    if isinstance(error, APIStatusError):
        return 400 <= error.status_code < 500 and error.status_code != 408
    return error is not None and _by_user(error.__cause__)
