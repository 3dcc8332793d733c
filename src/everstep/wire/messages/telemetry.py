"""Telemetry: events that a client reports to its service."""

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
    """A client started."""


class SessionEndEvent(_Event):
    """A client ended after ``duration``."""

    duration: str


class UnhandledExceptionEvent(_Event):
    """An exception that is not the user's fault."""

    error_type: str
    error_message: str
    traceback: str | None = None


class GenericEvent(_Event):
    """Any other event, by its name."""

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
