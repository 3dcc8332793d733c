"""Tracing: operations as OpenTelemetry spans, in programs that use OpenTelemetry.

Nothing of it is imported here: a program that traces has loaded it, and in one that hasn't this
does nothing. A span begins where the operation is called, so its parent is the caller's span, also
though the work is done on the client's own event loop; requests carry it on to the service.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from everstep.client._hooks import RequestEvent
from everstep.client._version import VERSION

_NAME = "everstep.client"


def on() -> bool:
    """Whether the program uses OpenTelemetry."""
    return "opentelemetry.trace" in sys.modules


@contextmanager
def span(request_type: str) -> Iterator[Any]:
    """A span of an operation, current while it is under way; None where nothing is traced."""
    if not on():
        yield None
        return
    from opentelemetry import trace

    tracer = trace.get_tracer(_NAME, VERSION)
    with tracer.start_as_current_span(
        f"tinker {request_type}", kind=trace.SpanKind.CLIENT
    ) as current:
        yield current


def describe(current: Any, event: RequestEvent) -> None:
    """Put what is known of an operation on its span; an exception puts itself there."""
    if current is None or not current.is_recording():
        return
    for name, value in vars(event).items():
        if value is not None:
            current.set_attribute(f"tinker.{name}", value)


def headers(own: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """A request's headers, with those by which the service can go on with the trace."""
    if not on():
        return own
    from opentelemetry import propagate

    carried = dict(own or {})
    propagate.inject(carried)
    return carried
