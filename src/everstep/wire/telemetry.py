"""Events that a client tells its service."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from everstep.wire.base import Response

Severity = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
EventType = Literal["SESSION_START", "SESSION_END", "UNHANDLED_EXCEPTION", "GENERIC_EVENT"]


class _Event(Response):
    event: EventType
    event_id: str
    event_session_index: int
    severity: Severity
    timestamp: datetime


class SessionStartEvent(_Event):
    """A client began."""


class SessionEndEvent(_Event):
    """A client ended; ``duration`` is how long it lived."""

    duration: str


class UnhandledExceptionEvent(_Event):
    """Something failed that is not the user's fault."""

    error_type: str
    error_message: str
    traceback: str | None = None


class GenericEvent(_Event):
    """Anything else; ``event_name`` is one of few."""

    event_name: str
    event_data: dict[str, Any] = Field(default_factory=dict)


TelemetryEvent = SessionStartEvent | SessionEndEvent | UnhandledExceptionEvent | GenericEvent


class TelemetryBatch(Response):
    """Events of one client."""

    events: list[TelemetryEvent]
    platform: str
    sdk_version: str
    session_id: str
    process_uuid: str
