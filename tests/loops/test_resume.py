"""resume_or_create: the checkpoint that a run continues from, and the ones it skips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import everstep
from everstep import Checkpointer, CheckpointPolicy, LoopState
from everstep.loops import state as loop_state
from everstep.loops.events import LoopEvent
from everstep.wire import types
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, Refused
from tests.client.keeping_service import KeepingService

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def fake() -> Iterator[KeepingService]:
    with KeepingService() as service:
        yield service


def begin(client: everstep.ServiceClient, run_name: str = "sft", **more: Any) -> Any:
    arguments: dict[str, Any] = {"rank": 4, "seed": 1} | more
    return everstep.resume_or_create(client, run_name, MODEL, **arguments).result(GIVE_UP_SECONDS)


def saved(client: everstep.ServiceClient, *states: LoopState, run_name: str = "sft") -> list[str]:
    """Save checkpoints at some states and return their paths."""
    saves = Checkpointer(begin(client, run_name), CheckpointPolicy())
    return [saves.save(state).result(GIVE_UP_SECONDS).path for state in states]


def test_run_without_checkpoints_is_created(fake: KeepingService, client: Any) -> None:
    training, state, report = begin(client, user_metadata={"team": "a"})
    assert state == LoopState() and not report.resumed and report.complete
    created = fake.to("/create_model")[0].body
    assert created["user_metadata"] == {"team": "a", "everstep_run": "sft"}
    assert (created["lora_config"]["rank"], created["lora_config"]["seed"]) == (4, 1)
    assert training.model_id == "session-0:train:0"


def test_newest_checkpoint_is_restored_with_optimizer_and_loop_state(
    fake: KeepingService, client: Any
) -> None:
    state = LoopState(12, 3, 45, {"generator": [1, 2**70, "ü"], "nested": {"x": None}})
    paths = saved(client, LoopState(6), state)
    _, found, report = begin(client)
    assert found == state and report.path == paths[-1] and report.complete
    loaded = fake.to("/load_weights")[-1].body
    assert (loaded["path"], loaded["optimizer"]) == (paths[-1], True)


@pytest.mark.parametrize("category", ["user", "server"])
def test_unloadable_checkpoints_are_skipped_and_reported(
    fake: KeepingService, client: Any, caplog: pytest.LogCaptureFixture, category: str
) -> None:
    paths = saved(client, LoopState(1), LoopState(2), LoopState(3))
    fake.unloadable = dict.fromkeys(paths[1:], category)
    events: list[LoopEvent] = []
    _, state, report = begin(client, on_event=events.append)
    assert state.step == 1 and report.path == paths[0]
    assert [skipped.path for skipped in report.skipped] == [paths[2], paths[1]]
    assert all("this checkpoint is damaged" in skipped.reason for skipped in report.skipped)
    assert [event.kind for event in events] == ["skipped", "skipped", "resumed"]
    assert caplog.text.count("this checkpoint is damaged") == 2
    tries = [r.body["path"] for r in fake.to("/load_weights")]
    assert tries.count(paths[2]) == (1 if category == "user" else 2), "a server failure is retried"


def test_skipped_checkpoint_is_neither_counted_nor_deleted(
    fake: KeepingService, client: Any
) -> None:
    paths = saved(client, LoopState(1), LoopState(2))
    fake.unloadable = {paths[1]: "user"}
    saves = Checkpointer(begin(client), CheckpointPolicy(keep_last=2))
    new = saves.save(LoopState(2)).result(GIVE_UP_SECONDS).path
    assert list(fake.checkpoints) == [paths[0], paths[1], new]
    saves.save(LoopState(3)).result(GIVE_UP_SECONDS)
    assert paths[0] not in fake.checkpoints and paths[1] in fake.checkpoints


def test_checkpoint_deleted_after_listing_is_skipped(fake: KeepingService, client: Any) -> None:
    paths = saved(client, LoopState(1), LoopState(2))
    fake.script("/weights_info", Refused(404))
    assert begin(client).report.path == paths[0]


def test_load_is_retried_after_a_restart_of_the_service(fake: KeepingService, client: Any) -> None:
    paths = saved(client, LoopState(1), LoopState(2))
    fake.script("/retrieve_future", Refused(404))  # it has forgotten the load that it accepted
    report = begin(client).report
    assert report.path == paths[1] and not report.skipped


def test_lost_session_is_not_blamed_on_checkpoints(fake: KeepingService, client: Any) -> None:
    paths = saved(client, LoopState(1), LoopState(2))
    fake.script("/load_weights", *[Refused(400, {"detail": "the session is finished"})] * 2)
    fake.script("/session_heartbeat", Refused(410))
    with pytest.raises(everstep.RunLost, match="session session-0 is gone"):
        begin(client)
    fake.script("/load_weights", *[Refused(400)] * 2)  # with the session still there
    with pytest.raises(everstep.CheckpointsUnusable):
        begin(client)
    assert list(fake.checkpoints) == paths


def test_no_run_is_created_if_no_checkpoint_loads(fake: KeepingService, client: Any) -> None:
    paths = saved(client, LoopState(1), LoopState(2))
    fake.unloadable = dict.fromkeys(paths, "user")
    created = len(fake.to("/create_model"))
    with pytest.raises(everstep.CheckpointsUnusable, match="under another run name") as caught:
        begin(client)
    assert all(path in str(caught.value) for path in paths)
    assert len(fake.to("/create_model")) == created


@pytest.mark.parametrize("status", [401, 403])
def test_refused_caller_is_not_blamed_on_checkpoints(
    fake: KeepingService, client: Any, status: int
) -> None:
    saved(client, LoopState(1), LoopState(2))
    fake.script("/load_weights", Refused(status))
    with pytest.raises(everstep.APIError, match=str(status)):
        begin(client)


def test_changed_loop_state_is_rejected(fake: KeepingService, client: Any) -> None:
    paths = saved(client, LoopState(1, user={"a": 1}), LoopState(2, user={"a": 2}))
    metadata = fake.checkpoints[paths[1]]["user_metadata"]
    metadata["everstep_loop_0"] = metadata["everstep_loop_0"].replace('"a":2', '"a":3')
    _, state, report = begin(client)
    assert state == LoopState(1, user={"a": 1})
    assert "checksum" in report.skipped[0].reason


def test_loop_state_of_another_checkpoint_is_rejected(fake: KeepingService, client: Any) -> None:
    paths = saved(client, LoopState(1), LoopState(2))
    fake.checkpoints[paths[1]]["user_metadata"] = fake.checkpoints[paths[0]]["user_metadata"]
    assert "another checkpoint" in begin(client).report.skipped[0].reason


def test_different_settings_are_rejected_by_field(fake: KeepingService, client: Any) -> None:
    saved(client, LoopState(1))
    with pytest.raises(ValueError, match="rank is 4 there and 8 here"):
        begin(client, rank=8)


def test_different_optimizer_is_rejected_if_one_is_given(fake: KeepingService, client: Any) -> None:
    saved(client, LoopState(1))
    with pytest.raises(ValueError, match="optimizer is 'adamw' there and 'dimuon' here"):
        begin(client, optimizer=types.DimuonOptimizerConfig())
    assert begin(client, optimizer=types.AdamOptimizerConfig()).report.resumed


def test_only_the_runs_own_checkpoints_are_found_on_all_pages(
    fake: KeepingService, client: Any
) -> None:
    mine = saved(client, *(LoopState(step) for step in range(1, 6)))
    saved(client, LoopState(50), run_name="sft-2")
    other = begin(client, "x").client
    for name in ("sft", "sft.0009.000009.s9", "sft.0009.000009.s9.e0.p0.zzzzzzzz"):
        other.save_state(name).result(GIVE_UP_SECONDS)
    sampler = fake.checkpoints[mine[-1]] | {
        "checkpoint_id": "sampler_weights/sft.0009.000009.s9.e0.p0.aaaaaaaa",
        "checkpoint_type": "sampler",
        "tinker_path": "tinker://x/sampler_weights/sft.0009.000009.s9.e0.p0.aaaaaaaa",
    }
    fake.checkpoints["sampler"] = sampler
    fake.page = 2
    report = begin(client).report
    assert [each.path for each in report.known] == mine and report.path == mine[-1]


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "-a", "a" * 41, "ü"])
def test_invalid_run_name_is_rejected(client: Any, name: str) -> None:
    with pytest.raises(ValueError, match="a run name is"):
        everstep.resume_or_create(client, name, MODEL)


# Loop states


states = st.builds(
    LoopState,
    st.integers(0, 10**18 - 1),
    st.integers(0, 10**18 - 1),
    st.integers(0, 10**18 - 1),
    st.dictionaries(st.text(), json_values, max_size=4),
)


@given(states, st.dictionaries(st.from_regex(r"[a-d]{1,5}", fullmatch=True), st.floats()))
def test_loop_state_survives_a_round_trip(state: LoopState, metrics: dict[str, float]) -> None:
    metadata = loop_state.encode("sft", state, metrics)
    assert all(isinstance(value, str) and len(value) <= 1000 for value in metadata.values())
    decoded = loop_state.decode(metadata)
    assert decoded is not None and decoded[0] == state
    assert decoded[1].keys() == metrics.keys()
    for name, value in metrics.items():
        assert decoded[1][name] == value or math.isnan(value)


@given(states, st.data())
def test_any_change_of_a_loop_state_is_detected(state: LoopState, draw: st.DataObject) -> None:
    metadata = loop_state.encode("sft", state, {})
    key = draw.draw(st.sampled_from([k for k in metadata if k.startswith("everstep_loop_")]))
    if draw.draw(st.booleans()):
        del metadata[key]
    else:
        at = draw.draw(st.integers(0, len(metadata[key]) - 1))
        text = metadata[key]
        metadata[key] = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
    with pytest.raises(everstep.LoopStateDamaged):
        loop_state.decode(metadata)


def test_later_version_is_rejected() -> None:
    metadata = loop_state.encode("sft", LoopState(), {})
    metadata["everstep_loop"] = "2" + metadata["everstep_loop"][1:]
    with pytest.raises(everstep.LoopStateDamaged, match="has version 2"):
        loop_state.decode(metadata)


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ({"x": object()}, "has to be JSON"),
        ({"x": float("nan")}, "has to be JSON"),
        ({"x": (1, 2)}, "use text keys and lists"),
        ({1: 2}, "use text keys and lists"),
        ({"x": "a" * 70_000}, "64,000 are allowed"),
    ],
)
def test_invalid_loop_state_is_rejected(user: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        loop_state.encode("sft", LoopState(user=user), {})


def test_metrics_are_numbers_with_unreserved_names() -> None:
    for metrics in ({"everstep_run": 1.0}, {"loss": "low"}):
        with pytest.raises(ValueError, match="a metric is a number"):
            loop_state.encode("sft", LoopState(), metrics)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 1.5, True, 10**18])
def test_step_is_a_nonnegative_integer(value: Any) -> None:
    with pytest.raises(ValueError, match=r"LoopState\.step"):
        LoopState(value)
