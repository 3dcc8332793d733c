"""What a service says of its queue while an operation waits, and who is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import everstep
from everstep.client import _queue
from everstep.client._queue import PauseLog, QueueState
from tests.client.conftest import Clock
from tests.client.fake_service import (
    GIVE_UP_SECONDS,
    MODEL,
    Answered,
    FakeService,
    Reply,
    failed,
    try_again,
)

T = GIVE_UP_SECONDS
ADAM = everstep.AdamParams(learning_rate=0.1)


def waits(state: Any, reason: str | None = None, status: int = 408) -> Answered:
    body = {"type": "try_again", "request_id": "r", "queue_state": state}
    return Answered(Reply(status, body | {"queue_state_reason": reason}))


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of what is logged at most once a minute."""
    clock = Clock()
    monkeypatch.setattr(_queue, "monotonic", clock.monotonic)
    return clock


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("status", [408, 200])
def test_paused_training_is_told_once_a_minute(
    fake: FakeService, run: Any, minutes: Clock, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    paused = [waits("paused_capacity", "a gap at 3", status), waits("paused_rate_limit")]
    for place in (1, 2):
        fake.script("/retrieve_future", *paused, where=fake.polls_of(place))
    run.optim_step(ADAM).result(T)
    expected = f"Training of {run.model_id} is paused: a gap at 3"
    assert warnings(caplog) == [expected]
    minutes.now += 60
    run.optim_step(ADAM).result(T)
    assert warnings(caplog) == [expected, expected]


def test_paused_sampling_is_told(
    fake: FakeService, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(T)
    fake.script("/retrieve_future", waits("paused_rate_limit"), waits("paused_rate_limit", "x"))
    prompt = everstep.ModelInput.from_ints([1])
    sampler.sample(prompt, 1, everstep.SamplingParams(max_tokens=3)).result(T)
    assert warnings(caplog) == [
        f"Sampling from {sampler.sampling_session_id} is paused: the service's limit of "
        "concurrent work is reached"
    ]


def test_a_run_that_waits_to_be_created_is_told_of(
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
    ids=["active", "active in 200", "nothing", "a proxy's own"],
)
def test_what_is_not_paused_is_not_told(
    fake: FakeService, run: Any, caplog: pytest.LogCaptureFixture, fault: Answered
) -> None:
    fake.script("/retrieve_future", fault, where=fake.polls_of(1))
    run.optim_step(ADAM).result(T)
    assert warnings(caplog) == []


class Watching(everstep.TrainingClient):
    """A client whose owner wants to know."""

    seen: list[tuple[str, str | None]]

    def on_queue_state_change(self, queue_state: str, queue_state_reason: str | None) -> None:
        self.seen.append((queue_state, queue_state_reason))
        raise ValueError("an observer's own")


def test_an_observer_is_told_of_the_end_of_a_pause_and_may_fail(
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


def test_any_pass_is_watched(fake: FakeService, run: Any) -> None:
    watching = Watching(run.holder, run.model_seq_id, run.model_id, info=run.get_info())
    watching.seen = []
    data = everstep.Datum(
        model_input=everstep.ModelInput.from_ints([1]),
        loss_fn_inputs={"target_tokens": [1], "weights": [1.0]},
    )
    fake.script("/retrieve_future", waits("paused_capacity", "p"), where=fake.polls_of(1))
    watching.forward_backward([data], "cross_entropy").result(T)
    assert watching.seen[0] == ("paused_capacity", "p")


def test_a_state_may_be_given_as_text_or_as_itself(caplog: pytest.LogCaptureFixture) -> None:
    log = PauseLog("It")
    log("active", None)
    log(QueueState.ACTIVE, None)
    assert warnings(caplog) == []
    log("of tomorrow", None)
    assert warnings(caplog) == ["It is paused: the service doesn't say why"]
