"""Checkpointer: its saves, confirmations, deletions and failures."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import everstep
from everstep import Checkpointer, CheckpointPolicy, LoopState
from everstep.loops import checkpointer, retention
from everstep.loops.catalog import SavedCheckpoint, SaveId
from everstep.loops.events import LoopEvent
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, Held, Lost, Refused, failed
from tests.client.fixtures import Clock
from tests.client.keeping_service import KeepingService


@pytest.fixture
def fake() -> Iterator[KeepingService]:
    with KeepingService() as service:
        yield service


@pytest.fixture
def time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of policies as well."""
    for module in (checkpointer, retention):
        monkeypatch.setattr(module, "monotonic", clock.monotonic)
    return clock


def begin(client: everstep.ServiceClient, run_name: str = "sft") -> everstep.Resumed:
    return everstep.resume_or_create(client, run_name, MODEL, rank=4, seed=1).result(
        GIVE_UP_SECONDS
    )


def steps(fake: KeepingService) -> list[int]:
    """Return the steps whose checkpoints are listed."""
    return [int(name.split(".s")[1].split(".")[0]) for name in fake.names()]


def loop(saves: Checkpointer, count: int, first: int = 1, **metrics: list[float]) -> None:
    for step in range(first, first + count):
        now = {name: values[step - first] for name, values in metrics.items()}
        saves.step(LoopState(step), now)
        saves.flush().result(GIVE_UP_SECONDS)


def test_saves_every_number_of_steps(fake: KeepingService, client: Any) -> None:
    with Checkpointer(begin(client), CheckpointPolicy(every_steps=3)) as saves:
        loop(saves, 10)
    assert steps(fake) == [3, 6, 9]


def test_saves_every_number_of_seconds(fake: KeepingService, client: Any, time: Clock) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_seconds=60))
    for step, now in enumerate((0.0, 59.0, 60.0, 61.0, 119.0, 125.0), start=1):
        time.now = 1000.0 + now
        loop(saves, 1, first=step)
    assert steps(fake) == [3, 6]


def test_step_never_waits_and_one_save_is_in_progress(fake: KeepingService, client: Any) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1))
    fake.hold_result(1)
    assert saves.step(LoopState(1))
    assert not saves.step(LoopState(2)) and not saves.step(LoopState(3))
    fake.release_result(1)
    saves.flush().result(GIVE_UP_SECONDS)
    assert saves.step(LoopState(4))
    saves.flush().result(GIVE_UP_SECONDS)
    assert steps(fake) == [1, 4]


def test_last_and_best_checkpoints_are_kept(fake: KeepingService, client: Any) -> None:
    policy = CheckpointPolicy(every_steps=1, keep_last=2, keep_best=2, metric="loss")
    saves = Checkpointer(begin(client), policy)
    loop(saves, 7, loss=[5.0, 1.0, 4.0, float("nan"), 2.0, 6.0, 7.0])
    assert steps(fake) == [2, 5, 6, 7]


def test_best_checkpoint_can_be_the_largest(fake: KeepingService, client: Any) -> None:
    policy = CheckpointPolicy(every_steps=1, keep_best=1, metric="reward", mode="max")
    saves = Checkpointer(begin(client), policy)
    loop(saves, 4, reward=[1.0, 9.0, float("inf"), 3.0])
    assert steps(fake) == [2, 4]


def test_nothing_is_deleted_before_the_new_checkpoint_is_confirmed(
    fake: KeepingService, client: Any, clock: Clock
) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1, keep_last=1))
    loop(saves, 1)
    fake.hides = lambda path: True
    saves.step(LoopState(2))
    with pytest.raises(everstep.CheckpointNotConfirmed, match="does not list it"):
        saves.flush().result(GIVE_UP_SECONDS)
    assert fake.deleted == [] and steps(fake) == [1]
    assert clock.waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0], "the list may lag behind"
    fake.hides = lambda path: False
    loop(saves, 1, first=3)
    assert steps(fake) == [3]


def test_saves_in_progress_delete_nothing_that_is_not_confirmed(
    fake: KeepingService, client: Any
) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(keep_last=2))
    fake.hold_result(1)
    begun = [saves.save(LoopState(step)) for step in range(1, 6)]
    fake.arrived("/save_weights", len(begun))
    fake.release_result(1)
    for step, save in enumerate(begun, start=1):
        assert save.result(GIVE_UP_SECONDS).state.step == step
    assert steps(fake) == [4, 5] and len(fake.deleted) == 3


def test_old_checkpoint_is_deleted_after_the_new_one_was_listed(
    fake: KeepingService, client: Any
) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1, keep_last=1))
    loop(saves, 3)
    names = [request.body["path"] for request in fake.to("/save_weights")]
    assert len(names) == 3 and fake.deleted == names[:2]
    order = [(r.method, r.path.split("/")[-1]) for r in fake.requests]
    saves_at = [i for i, request in enumerate(fake.requests) if request.path == "/save_weights"]
    for index, name in enumerate(fake.deleted):
        deleted = order.index(("DELETE", name))
        assert saves_at[index + 1] < deleted
        assert ("GET", "checkpoints") in order[saves_at[index + 1] : deleted]


@pytest.mark.parametrize("explicit", [False, True])
def test_failed_save_is_raised_once_by_the_next_call(
    fake: KeepingService, client: Any, explicit: bool
) -> None:
    events: list[LoopEvent] = []
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1), events.append)
    fake.script("/retrieve_future", failed("disk full", "server"), where=fake.polls_of(1))
    if explicit:
        with pytest.raises(everstep.CheckpointFailed, match="disk full"):
            saves.save(LoopState(1)).result(GIVE_UP_SECONDS)
    else:
        assert saves.step(LoopState(1))
        assert saves._in_flight is not None
        saves._in_flight.future().exception(GIVE_UP_SECONDS)
        with pytest.raises(everstep.CheckpointFailed, match="disk full") as caught:
            saves.step(LoopState(2))
        assert isinstance(caught.value.__cause__, everstep.RequestFailedError)
    assert [event.kind for event in events] == ["save_failed"]
    loop(saves, 1, first=3)
    assert steps(fake)[-1] == 3


def test_unretrieved_failure_is_raised_at_the_end(fake: KeepingService, client: Any) -> None:
    fake.script("/save_weights", Refused(422, consumes=True))
    with (
        pytest.raises(everstep.CheckpointFailed, match="422"),
        Checkpointer(begin(client), CheckpointPolicy(every_steps=1)) as saves,
    ):
        saves.step(LoopState(1))


def test_failed_save_does_not_hide_the_loops_exception(fake: KeepingService, client: Any) -> None:
    fake.script("/save_weights", Refused(422, consumes=True))
    with (
        pytest.raises(KeyError, match="mine"),
        Checkpointer(begin(client), CheckpointPolicy(every_steps=1)) as saves,
    ):
        saves.step(LoopState(1))
        raise KeyError("mine")


def test_failed_deletion_is_raised_and_retried(fake: KeepingService, client: Any) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1, keep_last=1))
    loop(saves, 1)
    first = fake.names()[0]
    fake.script(f"/training_runs/session-0:train:0/checkpoints/weights/{first}", Refused(403))
    saves.step(LoopState(2))
    with pytest.raises(everstep.CheckpointFailed, match="403"):
        saves.flush().result(GIVE_UP_SECONDS)
    assert steps(fake) == [1, 2]
    loop(saves, 1, first=3)
    assert steps(fake) == [3]


def test_failed_save_is_due_again(fake: KeepingService, client: Any) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=5))
    fake.script("/retrieve_future", failed("disk full", "server"), where=fake.polls_of(1))
    loop(saves, 4)
    assert saves.step(LoopState(5))
    with pytest.raises(everstep.CheckpointFailed, match="disk full"):
        saves.flush().result(GIVE_UP_SECONDS)
    assert saves.step(LoopState(6)), "at once, not five steps later"
    loop(saves, 6, first=7)
    assert steps(fake)[1:] == [6, 11]


def test_saves_are_confirmed_in_order(fake: KeepingService, client: Any) -> None:
    events: list[LoopEvent] = []
    saves = Checkpointer(begin(client), CheckpointPolicy(keep_last=1), events.append)
    held = Held()
    fake.script("/retrieve_future", held, where=fake.polls_of(1))
    first, second = saves.save(LoopState(1)), saves.save(LoopState(2))
    held.wait_for_arrival()
    fake.arrived("/retrieve_future", 3)  # the run's creation and both saves
    assert not first.done()
    held.release()
    saves.flush().result(GIVE_UP_SECONDS)
    assert first.done() and second.done(), "flush waits for both"
    assert [(event.kind, event.step) for event in events if event.kind != "deleted"] == [
        ("saved", 1),
        ("saved", 2),
    ]
    assert steps(fake) == [2]


def test_deletion_is_reported_even_if_the_next_one_fails(fake: KeepingService, client: Any) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy())
    paths = [saves.save(LoopState(step)).result(GIVE_UP_SECONDS).path for step in (1, 2)]
    events: list[LoopEvent] = []
    saves = Checkpointer(begin(client), CheckpointPolicy(keep_last=1), events.append)
    refused = paths[1].removeprefix("tinker://").replace("/weights/", "/checkpoints/weights/")
    fake.script(f"/training_runs/{refused}", Refused(403))
    with pytest.raises(everstep.CheckpointFailed, match="403"):
        saves.save(LoopState(3)).result(GIVE_UP_SECONDS)
    assert [event.kind for event in events] == ["saved", "deleted", "save_failed"]
    assert events[1].path == paths[0]


def test_lost_reply_does_not_save_twice(fake: KeepingService, client: Any) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1))
    fake.script("/save_weights", Lost())
    loop(saves, 1)
    assert steps(fake) == [1]


def test_dropped_metadata_is_detected(
    fake: KeepingService, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.drops_metadata = True
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1, keep_last=1))
    saves.save(LoopState(7, 2, 40)).result(GIVE_UP_SECONDS)
    saves.step(LoopState(9, user={"seed": 3}))
    with pytest.raises(everstep.LoopStateLost, match=r"LoopState\.user is lost"):
        saves.flush().result(GIVE_UP_SECONDS)
    assert steps(fake) == [7, 9], "nothing was deleted"
    _, state, report = begin(client)
    assert state == LoopState(9) and not report.complete


def test_exactly_one_of_two_concurrent_processes_continues(
    fake: KeepingService, client: Any
) -> None:
    both = [Checkpointer(begin(client), CheckpointPolicy(every_steps=1)) for _ in range(2)]
    both.sort(key=lambda each: each._token)
    loop(both[1], 1)
    with pytest.raises(everstep.Superseded, match="taken over"):
        loop(both[0], 1)
    with pytest.raises(everstep.Superseded):
        both[0].step(LoopState(5))
    loop(both[1], 2, first=2)
    assert steps(fake).count(1) == 2 and steps(fake)[-1] == 3


def test_later_process_takes_over_and_keeps_the_others_checkpoints(
    fake: KeepingService, client: Any
) -> None:
    old = Checkpointer(begin(client), CheckpointPolicy(every_steps=1, keep_last=1))
    loop(old, 2)
    new = Checkpointer(begin(client), CheckpointPolicy(every_steps=1, keep_last=1))
    loop(new, 1, first=3)
    assert steps(fake) == [3]
    old.step(LoopState(3))
    with pytest.raises(everstep.Superseded):
        old.flush().result(GIVE_UP_SECONDS)
    loop(new, 1, first=4)
    assert fake.names()[-1].split(".")[1] == "0001"
    assert len(fake.names()) == 2, "the other process's checkpoint is kept"
    assert begin(client).state.step == 4, "the newest is of the process that took over"


def test_names_sort_in_save_order_across_resumptions(fake: KeepingService, client: Any) -> None:
    for count in (3, 6, 9):
        resumed = begin(client)
        with Checkpointer(resumed, CheckpointPolicy(every_steps=1)) as saves:
            loop(saves, 3, first=resumed.state.step + 1)
        saved = fake.names()
        assert saved == sorted(saved) and len(set(saved)) == len(saved) == count


def test_ttl_is_renewed_while_the_loop_runs_and_cleared_at_its_end(
    fake: KeepingService, client: Any, time: Clock
) -> None:
    policy = CheckpointPolicy(every_steps=2, keep_last=2, ttl=timedelta(hours=2))
    saves = Checkpointer(begin(client), policy)
    loop(saves, 4)
    assert [r.body["ttl_seconds"] for r in fake.to("/save_weights")] == [7200, 7200]
    assert fake.ttls == []
    time.now += 7200 / 4 + 1
    loop(saves, 1, first=5)  # no save is due, but the expiry is renewed
    assert [ttl for _, ttl in fake.ttls] == [7200, 7200]
    fake.ttls.clear()
    saves.finish(LoopState(5)).result(GIVE_UP_SECONDS)
    assert [name.split(".s")[1][0] for name, _ in fake.ttls] == ["4", "5"]
    assert {ttl for _, ttl in fake.ttls} == {None}
    assert "ttl_seconds" not in fake.to("/save_weights")[-1].body


def test_resumed_checkpoint_is_renewed_before_the_first_save(
    fake: KeepingService, client: Any, time: Clock
) -> None:
    policy = CheckpointPolicy(every_steps=100, keep_last=1, ttl=7200)
    Checkpointer(begin(client), policy).save(LoopState(5)).result(GIVE_UP_SECONDS)
    fake.ttls.clear()
    saves = Checkpointer(begin(client), policy)  # the other process may have died long ago
    saves.flush().result(GIVE_UP_SECONDS)
    assert [(name.split(".s")[1][0], ttl) for name, ttl in fake.ttls] == [("5", 7200)]
    time.now += 7200 / 4 + 1
    loop(saves, 1, first=6)
    assert len(fake.ttls) == 2, "renewed again while no save is due"


def test_finish_clears_the_expiry_that_another_policy_set(
    fake: KeepingService, client: Any
) -> None:
    early = CheckpointPolicy(ttl=7200)
    path = Checkpointer(begin(client), early).save(LoopState(1)).result(GIVE_UP_SECONDS).path
    fake.checkpoints[path]["expires_at"] = "2026-01-01T02:00:00Z"
    fake.ttls.clear()
    saves = Checkpointer(begin(client), CheckpointPolicy())
    saves.finish(LoopState(2)).result(GIVE_UP_SECONDS)
    assert fake.ttls == [(path.rsplit("/", 1)[1], None)]


def test_service_without_ttl_endpoint_is_tolerated(
    fake: KeepingService, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.no_ttl = True
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=1, ttl=7200))
    loop(saves, 1)
    saves.finish(LoopState(1)).result(GIVE_UP_SECONDS)
    assert "can't be changed" in caplog.text


def test_finish_does_not_save_the_same_state_twice(fake: KeepingService, client: Any) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy(every_steps=5))
    loop(saves, 5)
    path = saves.finish(LoopState(5)).result(GIVE_UP_SECONDS).path
    assert list(fake.checkpoints) == [path]


def test_finish_saves_again_after_a_failure_or_another_state(
    fake: KeepingService, client: Any
) -> None:
    saves = Checkpointer(begin(client), CheckpointPolicy())
    user = {"seen": 1}
    fake.script("/retrieve_future", failed("disk full", "server"), where=fake.polls_of(1))
    with pytest.raises(everstep.CheckpointFailed, match="disk full"):
        saves.save(LoopState(5, user=user)).result(GIVE_UP_SECONDS)
    again = saves.finish(LoopState(5, user=user)).result(GIVE_UP_SECONDS)
    assert again.state.user == {"seen": 1}
    user["seen"] = 2
    assert saves.finish(LoopState(5, user=user)).result(GIVE_UP_SECONDS).state.user == {"seen": 2}


def test_checkpointer_works_in_a_coroutine(fake: KeepingService, client: Any) -> None:
    async def main() -> None:
        resumed = await everstep.resume_or_create(client, "sft", MODEL, rank=4)
        async with Checkpointer(resumed, CheckpointPolicy(every_steps=2)) as saves:
            for step in range(1, 5):
                saves.step(LoopState(step))
                await saves.flush()
            assert (await saves.save(LoopState(9))).state.step == 9

    asyncio.run(main())
    assert steps(fake) == [2, 4, 9]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"every_steps": 0}, "every_steps has to be above 0"),
        ({"every_seconds": -1.0}, "every_seconds has to be above 0"),
        ({"keep_last": 0}, "keep_last has to be above 0"),
        ({"keep_best": 1}, "needs a metric"),
        ({"keep_best": -1}, "0 or more"),
        ({"mode": "best"}, "'min' or 'max'"),
        ({"ttl": timedelta(0)}, "ttl has to be above 0"),
    ],
)
def test_policy_out_of_bounds_is_rejected(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CheckpointPolicy(**fields)


losses = st.lists(st.none() | st.floats(), min_size=1, max_size=12)


@given(losses, st.none() | st.integers(1, 4), st.integers(0, 4), st.sampled_from(["min", "max"]))
def test_policy_keeps_the_last_and_the_best(
    values: list[float | None], keep_last: int | None, keep_best: int, mode: Any
) -> None:
    policy = CheckpointPolicy(keep_last=keep_last, keep_best=keep_best, metric="m", mode=mode)
    saved = [
        SavedCheckpoint(str(i), SaveId(0, i, "t"), LoopState(i), {} if v is None else {"m": v})
        for i, v in enumerate(values)
    ]
    kept = policy.kept(saved)
    assert saved[-1] in kept and kept == [each for each in saved if each in kept]
    if keep_last is None and keep_best == 0:
        assert kept == saved
        return
    last = saved[-(keep_last or 1) :]
    assert set(map(id, last)) <= set(map(id, kept))
    finite = [v for v in values if v is not None and abs(v) < float("inf")]
    best = sorted(finite, reverse=mode == "max")[:keep_best]
    others = [each.metrics["m"] for each in kept if each not in last]
    assert len(kept) <= len(last) + keep_best
    assert all(value in best for value in others)
    if keep_best and finite:
        assert best[0] in [each.metrics.get("m") for each in kept]
    for one, two in itertools.pairwise(kept):
        assert one.save_id < two.save_id
