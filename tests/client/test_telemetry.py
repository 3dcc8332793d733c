"""Telemetry: the events that a client sends to its service, and how to turn it off."""

from __future__ import annotations

from typing import Any

import pytest
from tinker.types.telemetry_send_request import TelemetrySendRequest

import everstep
from tests.client.fake_service import GIVE_UP_SECONDS, FakeService, Lost, failed

DATUM = everstep.Datum(
    model_input=everstep.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]}
)


def events(fake: FakeService) -> list[dict[str, Any]]:
    batches = [request.body for request in fake.to("/telemetry")]
    for batch in batches:
        TelemetrySendRequest.model_validate(batch)
        assert len(batch["events"]) <= 100
    return [event for batch in batches for event in batch["events"]]


def test_session_start_failures_and_end_are_sent(fake: FakeService) -> None:
    with everstep.ServiceClient(base_url=fake.url) as service:
        run = service.create_lora_training_client("fake/model").result(GIVE_UP_SECONDS)
        fake.script("/retrieve_future", failed("wrong shape"), failed("no disk", "server"))
        for _ in range(2):
            with pytest.raises(everstep.RequestFailedError):
                run.forward_backward([DATUM], "cross_entropy").result(GIVE_UP_SECONDS)
        telemetry = service.get_telemetry()
        assert telemetry is not None
        assert telemetry is run.get_telemetry()
        telemetry.log("epoch", {"number": 1})
    sent = events(fake)
    kinds = [event.get("event_name") or event["event"] for event in sent]
    assert kinds == ["SESSION_START", "user_error", "UNHANDLED_EXCEPTION", "epoch", "SESSION_END"]
    assert sent[1]["event_data"] == {"error_type": "RequestFailedError", "message": "wrong shape"}
    assert "no disk" in sent[2]["traceback"]
    assert [event["event_session_index"] for event in sent] == list(range(5))


def test_events_are_sent_in_batches(fake: FakeService) -> None:
    with everstep.ServiceClient(base_url=fake.url) as service:
        service.create_lora_training_client("fake/model").result(GIVE_UP_SECONDS)
        telemetry = service.get_telemetry()
        assert telemetry is not None
        for number in range(250):
            telemetry.log("tick", {"number": number})
    assert [len(request.body["events"]) for request in fake.to("/telemetry")] == [100, 100, 52]


def test_failing_telemetry_endpoint_is_ignored(fake: FakeService) -> None:
    with everstep.ServiceClient(base_url=fake.url) as service:
        service.create_lora_training_client("fake/model").result(GIVE_UP_SECONDS)
        fake.script("/telemetry", Lost(applied=False))
    assert fake.to("/sessions/session-0/finish")


def test_telemetry_can_be_turned_off(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with everstep.ServiceClient(base_url=fake.url) as service:
        service.create_lora_training_client("fake/model").result(GIVE_UP_SECONDS)
        assert service.get_telemetry() is None
    assert fake.to("/telemetry") == []
