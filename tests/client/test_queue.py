"""Queue states: pauses that a service reports, and the observers that are called."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import everstep
from everstep.client._transport import queue_state
from everstep.client._transport.queue_state import PauseLog, QueueState
from tests.client.fake_service import (
    GIVE_UP_SECONDS,
    MODEL,
    Answered,
    FakeService,
    Reply,
    failed,
    try_again,
)
from tests.client.fixtures import Clock

T = GIVE_UP_SECONDS
ADAM = everstep.AdamParams(learning_rate=0.1)


def waits(state: Any, reason: str | None = None, status: int = 408) -> Answered:
    body = {"type": "try_again", "request_id": "r", "queue_state": state}
    return Answered(Reply(status, body | {"queue_state_reason": reason}))


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the log that repeats at most once a minute."""
    clock = Clock()
    monkeypatch.setattr(queue_state, "monotonic", clock.monotonic)
    return clock


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("status", [408, 200])
def test_paused_training_is_logged_once_a_minute(
    fake: FakeService, run: Any, minutes: Clock, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    paused = [waits("paused_capacity", "a gap at 3", status), waits("paused_rate_limit")]
    for seq_id in (1, 2):
        fake.script("/retrieve_future", *paused, where=fake.polls_of(seq_id))
    run.optim_step(ADAM).result(T)
    expected = f"Training of {run.model_id} is paused: a gap at 3"
    assert warnings(caplog) == [expected]
    minutes.now += 60
    run.optim_step(ADAM).result(T)
    assert warnings(caplog) == [expected, expected]


def test_paused_sampling_is_logged(
    fake: FakeService, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    fake.script("/retrieve_future", waits("paused_rate_limit"), waits("paused_rate_limit", "x"))
    prompt = everstep.ModelInput.from_ints([1])
    sampler.sample(prompt, 1, everstep.SamplingParams(max_tokens=3)).result(T)
    assert warnings(caplog) == [
        f"Sampling from {sampler.sampling_session_id} is paused: the service's "
        "concurrency limit is reached"
    ]


def test_paused_creation_of_a_run_is_logged(
    fake: FakeService, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.script("/retrieve_future", waits("paused_capacity", "no room"))
    client.create_lora_training_client(MODEL).result(T)
    path = "tinker://r/weights/a"
    fake.script("/retrieve_future", waits("paused_capacity", "no room"))
    client.create_training_client_from_state(path).result(T)
    assert warnings(caplog) == [
        f"Creation of a run from {source} is paused: no room" for source in (MODEL, path)
    ]


@pytest.mark.parametrize(
    "fault",
    [try_again(408), try_again(200), waits(None), Answered(Reply(408, b"<html>", {}, "text/html"))],
    ids=["active", "active in 200", "nothing", "a proxy's page"],
)
def test_unpaused_operation_is_not_logged(
    fake: FakeService, run: Any, caplog: pytest.LogCaptureFixture, fault: Answered
) -> None:
    fake.script("/retrieve_future", fault, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    assert warnings(caplog) == []


class Watching(everstep.TrainingClient):
    """A client that overrides the observer."""

    seen: list[tuple[str, str | None]]

    def on_queue_state_change(self, queue_state: str, queue_state_reason: str | None) -> None:
        self.seen.append((queue_state, queue_state_reason))
        raise ValueError("an observer's own")


def test_observer_gets_the_end_of_a_pause_and_may_raise(
    fake: FakeService, run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    watching = Watching(run.holder, run.model_seq_id, run.model_id, info=run.get_info())
    watching.seen = []
    fake.script(
        "/retrieve_future", waits("paused_capacity", "a"), waits("new"), where=fake.polls_of(1)
    )
    watching.optim_step(ADAM).result(T)
    assert watching.seen == [("paused_capacity", "a"), ("unknown", None), ("active", None)]
    assert "an observer's own" in caplog.text
    watching.seen.clear()
    fake.script("/retrieve_future", waits("paused_capacity"), failed("x"), where=fake.polls_of(2))
    with pytest.raises(everstep.RequestFailedError):
        watching.optim_step(ADAM).result(T)
    assert watching.seen == [("paused_capacity", None), ("active", None)]


def test_observer_gets_pauses_of_training_passes(fake: FakeService, run: Any) -> None:
    watching = Watching(run.holder, run.model_seq_id, run.model_id, info=run.get_info())
    watching.seen = []
    data = everstep.Datum(
        model_input=everstep.ModelInput.from_ints([1]),
        loss_fn_inputs={"target_tokens": [1], "weights": [1.0]},
    )
    fake.script("/retrieve_future", waits("paused_capacity", "p"), where=fake.polls_of(1))
    watching.forward_backward([data], "cross_entropy").result(T)
    assert watching.seen[0] == ("paused_capacity", "p")


def test_pause_log_takes_text_and_enum_states(caplog: pytest.LogCaptureFixture) -> None:
    log = PauseLog("It")
    log("active", None)
    log(QueueState.ACTIVE, None)
    assert warnings(caplog) == []
    log("of tomorrow", None)
    assert warnings(caplog) == ["It is paused: the service gave no reason"]
