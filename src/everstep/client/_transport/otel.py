"""Tracing: operations as OpenTelemetry spans, in programs that use OpenTelemetry.

This module imports OpenTelemetry only if the program has loaded it, and does nothing otherwise. A
span begins where the operation is called, so its parent is the caller's span even though the work
runs on the client's own event loop. Requests propagate the trace to the service.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from everstep._version import __version__
from everstep.client._transport.request_events import RequestEvent

_NAME = "everstep.client"


def enabled() -> bool:
    """Return whether the program uses OpenTelemetry."""
    return "opentelemetry.trace" in sys.modules


@contextmanager
def span(request_type: str) -> Iterator[Any]:
    """Start the span of an operation and make it current. Yields None if tracing is off."""
    if not enabled():
        yield None
        return
    from opentelemetry import trace

    tracer = trace.get_tracer(_NAME, __version__)
    with tracer.start_as_current_span(
        f"tinker {request_type}", kind=trace.SpanKind.CLIENT
    ) as current:
        yield current


def set_attributes(current: Any, event: RequestEvent) -> None:
    """Set an operation's event as attributes of its span. Exceptions record themselves."""
    if current is None or not current.is_recording():
        return
    for name, value in vars(event).items():
        if value is not None:
            current.set_attribute(f"tinker.{name}", value)


def headers(own: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return a request's headers, with those that propagate the trace."""
    if not enabled():
        return own
    from opentelemetry import propagate

    carried = dict(own or {})
    propagate.inject(carried)
    return carried
