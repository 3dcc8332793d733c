"""Recovery: a run that its service has lost is restored under the user's client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import everstep
from everstep import Checkpointer, CheckpointPolicy, LoopState, Recovery, RecoveryPolicy
from everstep.loops.catalog import SavedCheckpoint, SaveId
from everstep.loops.events import LoopEvent
from everstep.loops.failure_classification import FailureClass, classify
from everstep.wire.errors import ErrorCategory
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, Held, Refused, failed
from tests.client.fixtures import Clock
from tests.client.keeping_service import KeepingService


@pytest.fixture
def fake() -> Iterator[KeepingService]:
    with KeepingService() as service:
        yield service


class Loop:
    """A loop that saves every second step and that can be disturbed.

    Attributes:
        events_at: functions to call once before a step.
        seen: the steps that were made.
        started: the steps from which it started.
    """

    def __init__(self, client: Any, policy: RecoveryPolicy | None = None, **more: Any) -> None:
        started = everstep.resume_or_create(client, "sft", MODEL, rank=4, seed=1)
        resumed = started.result(GIVE_UP_SECONDS)
        self.client = resumed.client
        self.events: list[LoopEvent] = []
        self.saves = Checkpointer(resumed, CheckpointPolicy(every_steps=2))
        policy = policy or RecoveryPolicy(watch_seconds=None)
        self.recovery = Recovery(client, resumed, self.saves, policy, self.events.append, **more)
        self.events_at: dict[int, Any] = {}
        self.losses = [0.0] * 6
        self.seen: list[int] = []
        self.started: list[int] = []

    def __call__(self, state: LoopState) -> str:
        self.started.append(state.step)
        for step in range(state.step, 6):
            if step in self.events_at:
                self.events_at.pop(step)()
            self.client.optim_step(everstep.AdamParams()).result(GIVE_UP_SECONDS)
            self.seen.append(step)
            self.saves.step(LoopState(step + 1), {"loss": self.losses[step]})
            self.saves.flush().result(GIVE_UP_SECONDS)
        return "done"

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def test_undisturbed_loop_runs_once(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    assert loop.recovery.run(loop) == "done"
    assert loop.started == [0] and loop.events == []


@pytest.mark.parametrize("loss", ["run gone", "session gone", "corrupted", "worker lost"])
def test_lost_run_is_recovered_in_place(fake: KeepingService, client: Any, loss: str) -> None:
    loop = Loop(client)
    mine, first = loop.client, loop.client.model_id

    def lose() -> None:
        if loss == "run gone":
            fake.gone.add(first)
        elif loss == "session gone":
            fake.gone |= {"session-0", first}
        else:
            category = "user" if loss == "corrupted" else "server"
            if loss == "corrupted":
                fake.corrupted.add(first)
            fake.script("/retrieve_future", failed("it is lost", category))

    loop.events_at = {3: lose}
    assert loop.recovery.run(loop) == "done"
    assert loop.started == [0, 2] and loop.seen == [0, 1, 2, 2, 3, 4, 5]
    assert loop.client is mine and mine.model_id != first
    assert mine.model_id.startswith("session-1:" if loss == "session gone" else "session-0:")
    assert loop.kinds() == ["lost", "attempt", "resumed", "recovered"]
    loaded = fake.to("/load_weights")[-1].body
    assert loaded["optimizer"] and loaded["path"].split(".s")[1].startswith("2.")
    generations = [name.split(".")[1] for name in fake.names()]
    assert generations == ["0000", "0001", "0001"]


def test_run_without_checkpoints_is_created_again(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    first = loop.client.model_id
    loop.events_at = {1: lambda: fake.gone.add(first)}
    loop.recovery.run(loop)
    assert loop.started == [0, 0]
    rank = [request.body["lora_config"] for request in fake.to("/create_model")]
    assert rank[0] == rank[1]


def test_recovery_can_continue_from_the_best_checkpoint(fake: KeepingService, client: Any) -> None:
    policy = RecoveryPolicy(strategy="best", metric="loss", watch_seconds=None)
    loop = Loop(client, policy)
    loop.losses = [9.0, 1.0, 9.0, 2.0, 9.0, 9.0]
    loop.events_at = {5: lambda: fake.gone.add("session-0:train:0")}
    loop.recovery.run(loop)
    assert loop.started == [0, 2]


def test_sampling_clients_of_the_run_follow(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    saved = loop.client.save_weights_and_get_sampling_client().result(GIVE_UP_SECONDS)
    path = "tinker://session-0:train:0/weights/x"
    named = loop.client.create_sampling_client(path).result(GIVE_UP_SECONDS)
    before = {saved.sampling_session_id, named.sampling_session_id}
    loop.events_at = {3: lambda: fake.gone.update({"session-0", "session-0:train:0"})}
    loop.recovery.run(loop)
    for sampler in (saved, named):
        assert sampler.sampling_session_id not in before
        assert sampler.sampling_session_id.startswith("session-1:sample:")
        prompt = everstep.ModelInput.from_ints([1, 2])
        sampler.sample(prompt, 1, everstep.SamplingParams()).result(GIVE_UP_SECONDS)
    assert fake.to("/create_sampling_session")[-1].body["model_path"] == path


def test_sampling_client_without_its_checkpoint_is_not_rebound(
    fake: KeepingService, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(client)
    path = "tinker://session-0:train:0/sampler_weights/reference"
    reference = loop.client.create_sampling_client(path).result(GIVE_UP_SECONDS)
    fake.script("/create_sampling_session", Refused(404, {"detail": "no such checkpoint"}))
    loop.events_at = {3: lambda: fake.gone.update({"session-0", "session-0:train:0"})}
    loop.recovery.run(loop)
    assert reference.sampling_session_id.startswith("session-0:"), "unchanged"
    assert f"can no longer sample from {path}" in caplog.text
    assert fake.to("/save_weights_for_sampler") == []


def test_failed_sampling_client_is_rebound_by_the_next_attempt(
    fake: KeepingService, client: Any
) -> None:
    loop = Loop(client)
    path = "tinker://session-0:train:0/sampler_weights/reference"
    reference = loop.client.create_sampling_client(path).result(GIVE_UP_SECONDS)
    broken = Refused(500, headers={"x-should-retry": "false"})
    fake.script("/create_sampling_session", broken)
    loop.events_at = {3: lambda: fake.gone.update({"session-0", "session-0:train:0"})}
    loop.recovery.run(loop)
    assert reference.sampling_session_id.startswith("session-1:")
    assert fake.to("/create_sampling_session")[-1].body["model_path"] == path
    assert loop.kinds().count("attempt") == 2 and loop.kinds().count("lost") == 1


def test_pending_operations_stay_with_the_lost_run(fake: KeepingService, client: Any) -> None:
    """Pending futures belong to the lost run, and later calls to the new one."""
    loop = Loop(client)
    run = loop.client
    loop.saves.save(LoopState(2)).result(GIVE_UP_SECONDS)
    sampler = run.save_weights_and_get_sampling_client().result(GIVE_UP_SECONDS)
    fake.hold_result(3)
    step = run.optim_step(everstep.AdamParams())  # never executed
    held = Held()
    fake.script("/asample", held)
    sample = sampler.sample(everstep.ModelInput.from_ints([1]), 1, everstep.SamplingParams())
    held.wait_for_arrival()
    fake.arrived("/optim_step")
    fake.gone |= {"session-0", "session-0:train:0"}
    loop.recovery.recover(everstep.RunLost("a test says so")).result(GIVE_UP_SECONDS)
    assert not step.done() and run.model_id == "session-1:train:0"
    after = run.optim_step(everstep.AdamParams()).result(GIVE_UP_SECONDS)
    assert (after.metrics or {})["step:max"] < 3, "sequence ids start over"
    fake.release_result(3)
    held.release()
    assert (step.result(GIVE_UP_SECONDS).metrics or {})["step:max"] == 3
    sample.result(GIVE_UP_SECONDS)
    sampled = fake.to("/asample")[-1].body["sampling_session_id"]
    assert sampled.startswith("session-0:") and sampler.sampling_session_id.startswith("session-1:")
    runs = [request.body["model_id"] for request in fake.to("/optim_step")]
    assert runs == ["session-0:train:0", "session-1:train:0"]


def test_lost_session_stops_its_background_tasks(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    lost = client.holder
    fake.gone |= {"session-0", "session-0:train:0"}
    loop.recovery.recover(everstep.RunLost("a test says so")).result(GIVE_UP_SECONDS)
    assert client.holder is not lost
    assert lost._background == set() and client.holder._background


def test_service_that_lists_no_runs_has_not_lost_them(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    fake.lists_no_runs = True

    def fail() -> None:
        raise everstep.BadRequestError("no", 400)

    loop.events_at = {3: fail}
    with pytest.raises(everstep.BadRequestError):
        loop.recovery.run(loop)
    assert loop.events == []
    loop.events_at = {3: lambda: fake.gone.add("session-0:train:0")}
    assert loop.recovery.run(loop) == "done"
    assert loop.kinds() == ["lost", "attempt", "resumed", "recovered"]


def test_loss_in_a_task_group_is_recovered(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)

    async def body(state: LoopState) -> str:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(asyncio.to_thread(loop, state))
        return task.result()

    loop.events_at = {3: lambda: fake.gone.add("session-0:train:0")}
    assert asyncio.run(loop.recovery.run_async(body)) == "done"
    assert loop.started == [0, 2]
    assert "410" in str(loop.events[0].detail), "the reason, not the exception group"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        everstep.BadRequestError("no", 400),
        everstep.AuthenticationError("no", 401),
        everstep.RequestFailedError("checkpoint does not exist", "r", ErrorCategory.USER),
        everstep.NotFoundError("no such checkpoint", 404),
        everstep.Superseded("another"),
        everstep.LoopStateLost("dropped"),
    ],
)
def test_permanent_failures_are_raised(fake: KeepingService, client: Any, error: Exception) -> None:
    loop = Loop(client)

    def fail() -> None:
        raise error

    loop.events_at = {3: fail}
    with pytest.raises(type(error)) as caught:
        loop.recovery.run(loop)
    assert caught.value is error
    assert loop.events == [] and fake.to("/load_weights") == []


def test_failed_save_of_a_lost_run_is_a_loss(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    gone = Refused(410, consumes=True)
    loop.events_at = {3: lambda: fake.script("/save_weights", gone)}
    loop.recovery.run(loop)
    assert loop.started == [0, 2]


def test_late_failure_of_the_lost_run_is_discarded(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    step = LoopState(2)
    loop.saves.save(step).result(GIVE_UP_SECONDS)
    fake.hold_result(2)
    late = loop.saves.save(LoopState(4))
    fake.arrived("/save_weights", 2)
    loop.recovery.recover(everstep.RunLost("a test says so")).result(GIVE_UP_SECONDS)
    fake.script("/retrieve_future", failed("too late", "server"), where=fake.polls_of(2))
    fake.gone.add("session-0:train:0")
    fake.release_result(2)
    late.future().exception(GIVE_UP_SECONDS)
    assert loop.saves.step(LoopState(6)), "it would raise the failure"
    loop.saves.flush().result(GIVE_UP_SECONDS)


def test_recovery_backs_off_and_gives_up(fake: KeepingService, client: Any, clock: Clock) -> None:
    policy = RecoveryPolicy(attempts=4, first_delay=3.0, longest_delay=5.0, watch_seconds=None)
    loop = Loop(client, policy)

    def lose() -> None:
        fake.gone.add("session-0:train:0")
        fake.script("/load_weights", *[Refused(500, headers={"x-should-retry": "false"})] * 9)

    loop.events_at = {3: lose}
    clock.waits.clear()
    with pytest.raises(everstep.RecoveryFailed, match="in 4 attempts"):
        loop.recovery.run(loop)
    assert [wait for wait in clock.waits if wait] == [3.0, 5.0, 5.0]
    assert loop.kinds() == ["lost", *["attempt"] * 4, "gave_up"]


def test_recovery_gives_up_after_its_time(fake: KeepingService, client: Any) -> None:
    policy = RecoveryPolicy(attempts=100, seconds=20, first_delay=8.0, watch_seconds=None)
    loop = Loop(client, policy)

    def lose() -> None:
        fake.gone.add("session-0:train:0")
        fake.script("/load_weights", *[Refused(500, headers={"x-should-retry": "false"})] * 9)

    loop.events_at = {3: lose}
    with pytest.raises(everstep.RecoveryFailed, match="in 3 attempts and 24 s"):
        loop.recovery.run(loop)


def test_step_that_always_loses_its_run_is_given_up(fake: KeepingService, client: Any) -> None:
    loop = Loop(client, RecoveryPolicy(attempts=3, watch_seconds=None))

    def lose() -> None:
        loop.events_at[3] = lose
        fake.gone.add(loop.client.model_id)

    loop.events_at = {3: lose}
    with pytest.raises(everstep.RecoveryFailed):
        loop.recovery.run(loop)
    assert loop.started == [0, 2, 2, 2]


def test_recovery_continues_while_the_loop_makes_progress(
    fake: KeepingService, client: Any
) -> None:
    loop = Loop(client, RecoveryPolicy(attempts=1, watch_seconds=None))

    def lose() -> None:
        fake.gone.add(loop.client.model_id)

    loop.events_at = {3: lose, 5: lose}
    loop.recovery.run(loop)
    assert loop.started == [0, 2, 4]


def test_recovery_works_in_a_coroutine(fake: KeepingService, client: Any) -> None:
    loop = Loop(client)
    loop.events_at = {3: lambda: fake.gone.add("session-0:train:0")}

    async def body(state: LoopState) -> str:
        return await asyncio.to_thread(loop, state)

    assert asyncio.run(loop.recovery.run_async(body)) == "done"
    assert loop.started == [0, 2]


def test_monitor_detects_a_loss(fake: KeepingService, client: Any) -> None:
    loop = Loop(client, RecoveryPolicy(watch_seconds=0.001))
    loop.recovery.check()
    fake.corrupted.add("session-0:train:0")
    with loop.recovery as recovery:
        assert recovery._monitor is not None and recovery._monitor._watching is not None
        recovery._monitor._watching.result(GIVE_UP_SECONDS)
        with pytest.raises(everstep.RunLost, match="is corrupted") as caught:
            recovery.check()
        recovery.recover(caught.value).result(GIVE_UP_SECONDS)
        recovery.check()
    assert loop.client.model_id == "session-0:train:1"


CLASSES = [
    (everstep.RunLost("x"), FailureClass.LOST),
    (everstep.APIConnectionError("x"), FailureClass.LOST),
    (everstep.InternalServerError("x", 503), FailureClass.LOST),
    (everstep.APIStatusError("x", 410), FailureClass.LOST),
    (everstep.RequestFailedError("x", "r", ErrorCategory.SERVER), FailureClass.LOST),
    (everstep.RequestFailedError("x", "r", ErrorCategory.UNKNOWN), FailureClass.LOST),
    (everstep.RequestFailedError("x", "r", ErrorCategory.USER), FailureClass.DOUBTFUL),
    (everstep.NotFoundError("x", 404), FailureClass.DOUBTFUL),
    (everstep.BadRequestError("x", 400), FailureClass.DOUBTFUL),
    (everstep.CheckpointNotConfirmed("x"), FailureClass.DOUBTFUL),
    (everstep.PermissionDeniedError("x", 403), FailureClass.PERMANENT),
    (everstep.UnprocessableEntityError("x", 422), FailureClass.PERMANENT),
    (everstep.LocalServiceError("x"), FailureClass.PERMANENT),
    (
        ExceptionGroup("x", [everstep.RunLost("x"), everstep.NotFoundError("x", 404)]),
        FailureClass.LOST,
    ),
    (ExceptionGroup("x", [everstep.RunLost("x"), KeyError("x")]), FailureClass.PERMANENT),
    (ExceptionGroup("x", [everstep.NotFoundError("x", 404)]), FailureClass.DOUBTFUL),
    (everstep.CheckpointsUnusable("x"), FailureClass.PERMANENT),
    (KeyError("x"), FailureClass.PERMANENT),
]


@pytest.mark.parametrize(("error", "expected"), CLASSES)
def test_failures_are_classified(error: Exception, expected: FailureClass) -> None:
    assert classify(error) is expected
    wrapped = everstep.CheckpointFailed("a save failed")
    wrapped.__cause__ = error
    assert classify(wrapped) is expected


def test_candidates_are_all_checkpoints_in_order() -> None:
    losses = [3.0, 1.0, None, float("nan"), 1.0]
    saved = [
        SavedCheckpoint(str(i), SaveId(0, i, "t"), LoopState(i), {} if v is None else {"loss": v})
        for i, v in enumerate(losses)
    ]

    def order(**policy: Any) -> list[str]:
        return [each.path for each in RecoveryPolicy(**policy).candidates(saved)]

    assert order() == ["4", "3", "2", "1", "0"]
    assert order(strategy="best", metric="loss") == ["4", "1", "0", "3", "2"]
    assert order(strategy="best", metric="loss", mode="max") == ["0", "4", "1", "3", "2"]


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "first"},
        {"strategy": "best"},
        {"attempts": 0},
        {"seconds": 0},
        {"watch_seconds": 0},
    ],
)
def test_policy_out_of_bounds_is_rejected(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RecoveryPolicy(**fields)
