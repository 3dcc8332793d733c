"""Reports of operations: events for hooks, and OpenTelemetry spans."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import everstep
from tests.client.fake_service import (
    GIVE_UP_SECONDS,
    MODEL,
    FakeService,
    Held,
    Lost,
    Refused,
    failed,
)
from tests.client.fixtures import Clock

DATUM = everstep.Datum(
    model_input=everstep.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]}
)


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    exporter.clear()


@pytest.fixture
def events(clock: Clock) -> list[everstep.RequestEvent]:
    """The events that hooks get."""
    return []


def begin(fake: FakeService, events: list[everstep.RequestEvent]) -> everstep.TrainingClient:
    service = everstep.ServiceClient(base_url=fake.url, api_key="tml-test", hooks=[events.append])
    return service.create_lora_training_client(MODEL).result(GIVE_UP_SECONDS)


def test_event_has_retries_polls_and_times(
    fake: FakeService, events: list[everstep.RequestEvent]
) -> None:
    run = begin(fake, events)
    fake.script("/optim_step", Lost(), Refused(503))
    fake.script("/retrieve_future", Refused(503), where=fake.polls_of(1))
    run.optim_step(everstep.AdamParams()).result(GIVE_UP_SECONDS)
    run.forward_backward([DATUM], "cross_entropy").result(GIVE_UP_SECONDS)
    created, stepped, passed = events
    assert (created.request_type, stepped.request_type) == ("CreateModel", "OptimStep")
    assert (stepped.retries, stepped.polls) == (2, 2)
    assert (passed.retries, passed.polls) == (0, 1)
    for event in events:
        assert event.accepted_s is not None
        assert 0 <= event.queue_s <= event.accepted_s <= event.duration_s


def test_event_has_the_time_in_the_queue(
    fake: FakeService, events: list[everstep.RequestEvent]
) -> None:
    run = begin(fake, events)
    held = Held()
    fake.script("/optim_step", held)
    first = run.optim_step(everstep.AdamParams())
    second = run.optim_step(everstep.AdamParams())
    held.wait_for_arrival()
    held.release()
    for future in (first, second):
        future.result(GIVE_UP_SECONDS)
    one, two = sorted(events[1:], key=lambda event: event.seq_id)
    assert one.accepted_s is not None and two.queue_s > one.queue_s


def test_refused_operation_has_no_acceptance_time(
    fake: FakeService, events: list[everstep.RequestEvent]
) -> None:
    run = begin(fake, events)
    fake.script("/optim_step", Refused(400, consumes=True))
    with pytest.raises(everstep.BadRequestError):
        run.optim_step(everstep.AdamParams()).result(GIVE_UP_SECONDS)
    assert events[-1].accepted_s is None and events[-1].outcome == "failed"


def test_operations_are_spans_under_the_callers_span(
    fake: FakeService, events: list[everstep.RequestEvent], spans: InMemorySpanExporter
) -> None:
    run = begin(fake, events)
    spans.clear()
    with trace.get_tracer("script").start_as_current_span("epoch") as epoch:
        futures: list[everstep.APIFuture[Any]] = [
            run.forward_backward([DATUM], "cross_entropy"),
            run.optim_step(everstep.AdamParams()),
            run.save_state("a"),
        ]
    for future in futures:
        future.result(GIVE_UP_SECONDS)
    found = {span.name: span for span in spans.get_finished_spans()}
    assert set(found) == {
        "epoch",
        "tinker ForwardBackward",
        "tinker OptimStep",
        "tinker SaveWeights",
    }
    for name, seq_id in (("ForwardBackward", 1), ("OptimStep", 2), ("SaveWeights", 3)):
        span = found[f"tinker {name}"]
        assert span.parent is not None
        assert span.parent.span_id == epoch.get_span_context().span_id
        assert _attributes(span) >= {
            ("tinker.request_type", name),
            ("tinker.session_id", "session-0"),
            ("tinker.run_id", "session-0:train:0"),
            ("tinker.seq_id", seq_id),
            ("tinker.retries", 0),
            ("tinker.outcome", "succeeded"),
        }


def test_trace_is_propagated_to_the_service(
    fake: FakeService, events: list[everstep.RequestEvent], spans: InMemorySpanExporter
) -> None:
    run = begin(fake, events)
    run.optim_step(everstep.AdamParams()).result(GIVE_UP_SECONDS)
    span = spans.get_finished_spans()[-1]
    context = span.get_span_context()
    assert context is not None
    for request in (fake.to("/optim_step")[0], fake.to("/retrieve_future")[-1]):
        expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-"
        assert request.headers["traceparent"].startswith(expected)


def test_failure_is_recorded_on_its_span(
    fake: FakeService, events: list[everstep.RequestEvent], spans: InMemorySpanExporter
) -> None:
    run = begin(fake, events)
    fake.script("/retrieve_future", failed("wrong shape"), where=fake.polls_of(1))
    with pytest.raises(everstep.RequestFailedError):
        run.optim_step(everstep.AdamParams()).result(GIVE_UP_SECONDS)
    span = spans.get_finished_spans()[-1]
    assert not span.status.is_ok
    assert ("tinker.error", "wrong shape") in _attributes(span)
    assert [event.name for event in span.events] == ["exception"]


def test_program_without_tracing_loads_no_opentelemetry(fake: FakeService) -> None:
    code = f"""
import sys, everstep
service = everstep.ServiceClient(base_url={fake.url!r}, api_key="tml-test", hooks=[print])
service.create_lora_training_client({MODEL!r}).result({GIVE_UP_SECONDS})
print([m for m in sys.modules if m.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "CreateModel" in done.stdout


def _attributes(span: ReadableSpan) -> set[tuple[str, object]]:
    return set((span.attributes or {}).items())
