"""Checkpoint groups: which groups are complete, and which never are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import everstep
from everstep import CheckpointGroup, LoopState
from everstep.loops.events import LoopEvent
from everstep.loops.group_names import member_name, partial_groups, tag_of
from everstep.wire import types
from tests.client.fake_service import GIVE_UP_SECONDS, MODEL, Held, failed
from tests.client.keeping_service import KeepingService


@pytest.fixture
def fake() -> Iterator[KeepingService]:
    with KeepingService() as service:
        yield service


def runs(client: Any, count: int) -> list[everstep.TrainingClient]:
    futures = [client.create_lora_training_client(MODEL, rank=4) for _ in range(count)]
    return [future.result(GIVE_UP_SECONDS) for future in futures]


def save(group: CheckpointGroup, clients: Any, step: int, **user: Any) -> everstep.GroupCheckpoint:
    states = [LoopState(step, user={**user, "index": i}) for i in range(len(clients))]
    return group.save_all(clients, states).result(GIVE_UP_SECONDS)


def complete_steps(group: CheckpointGroup) -> list[int]:
    return [each.step for each in group.checkpoints().result(GIVE_UP_SECONDS)]


def test_group_is_restored_completely_with_its_states(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 3)
    saved = save(group, runs(client, 3), 10, epoch_seed=5)
    assert [member.state.user["index"] for member in saved.members] == [0, 1, 2]
    restored = CheckpointGroup(client, "swarm", 3).restore().result(GIVE_UP_SECONDS)
    assert restored is not None and restored.checkpoint == saved and not restored.skipped
    assert restored.states == tuple(
        LoopState(10, user={"epoch_seed": 5, "index": i}) for i in range(3)
    )
    loads = fake.to("/load_weights")
    assert [r.body["path"] for r in loads] == [member.path for member in saved.members]
    assert all(r.body["optimizer"] for r in loads)
    assert len({each.model_id for each in restored.clients}) == 3


def test_restore_without_a_group_returns_none(client: Any) -> None:
    assert CheckpointGroup(client, "swarm", 2).restore().result(GIVE_UP_SECONDS) is None


def test_group_exists_once_the_last_member_exists(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 2, "job-1")
    first, second = runs(client, 2)
    waiting = group.save(0, first, LoopState(5))
    fake.arrived("/save_weights")
    assert complete_steps(group) == [] and not waiting.done()
    other_process = CheckpointGroup(client, "swarm", 2, "job-1")
    other_process.save(1, second, LoopState(5)).result(GIVE_UP_SECONDS)
    assert waiting.result(GIVE_UP_SECONDS).step == 5
    assert complete_steps(group) == [5]


def test_missing_members_are_named(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 3, "job-1", wait_seconds=30)
    with pytest.raises(everstep.GroupError, match="of 3 members 0, 2 did not save"):
        group.save(1, runs(client, 1)[0], LoopState(5)).result(GIVE_UP_SECONDS)
    assert complete_steps(group) == []
    assert CheckpointGroup(client, "swarm", 3).restore().result(GIVE_UP_SECONDS) is None


@pytest.mark.parametrize("other", ["attempt", "parent", "size", "step", "name"])
def test_member_of_another_group_fills_no_gap(
    fake: KeepingService, client: Any, other: str
) -> None:
    save(CheckpointGroup(client, "swarm", 2, "job-0"), runs(client, 2), 1)
    mine = CheckpointGroup(client, "swarm", 2, "job-1", wait_seconds=1)
    theirs = CheckpointGroup(
        client,
        "other" if other == "name" else "swarm",
        3 if other == "size" else 2,
        "job-2" if other == "attempt" else "job-1",
        wait_seconds=1,
    )
    mine.restore().result(GIVE_UP_SECONDS)
    if other not in ("parent", "size", "name"):
        theirs.restore().result(GIVE_UP_SECONDS)
    first, second = runs(client, 2)
    for group, index, run in ((mine, 0, first), (theirs, 1, second)):
        step = 6 if other == "step" and index else 5
        with pytest.raises(everstep.GroupError, match="is not complete") as caught:
            group.save(index, run, LoopState(step)).result(GIVE_UP_SECONDS)
    assert ("Others saved at that step" in str(caught.value)) == (other not in ("step", "name"))
    assert complete_steps(mine) == [1]


def test_duplicate_index_is_reported(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 2, "job-1")
    first, second = runs(client, 2)
    waiting = group.save(0, first, LoopState(5))
    fake.arrived("/save_weights")
    with pytest.raises(everstep.GroupError, match="two members of one index"):
        group.save(0, second, LoopState(5)).result(GIVE_UP_SECONDS)
    with pytest.raises(everstep.GroupError, match="two members of one index"):
        waiting.result(GIVE_UP_SECONDS)
    third = runs(client, 1)[0]
    with pytest.raises(everstep.GroupError):
        group.save(1, third, LoopState(5)).result(GIVE_UP_SECONDS)
    assert complete_steps(group) == [], "all members exist, but one twice"


def test_groups_of_one_name_are_complete_independently(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 2)
    clients = runs(client, 2)
    for step in (1, 2, 3):
        save(group, clients, step)
    group.save(0, clients[0], LoopState(4))
    fake.arrived("/save_weights", 7)
    assert complete_steps(group) == [1, 2, 3]
    restored = CheckpointGroup(client, "swarm", 2).restore().result(GIVE_UP_SECONDS)
    assert restored is not None and restored.checkpoint.step == 3


def test_another_group_size_is_rejected(fake: KeepingService, client: Any) -> None:
    save(CheckpointGroup(client, "swarm", 3), runs(client, 3), 1)
    with pytest.raises(everstep.GroupError, match=r"has 3 members, and 2 were requested"):
        CheckpointGroup(client, "swarm", 2).restore().result(GIVE_UP_SECONDS)


def test_group_with_an_unloadable_member_is_skipped(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 2)
    clients = runs(client, 2)
    old, new = save(group, clients, 1), save(group, clients, 2)
    fake.unloadable = {new.members[1].path: "user"}
    events: list[LoopEvent] = []
    again = CheckpointGroup(client, "swarm", 2, on_event=events.append)
    restored = again.restore().result(GIVE_UP_SECONDS)
    assert restored is not None and restored.checkpoint == old
    assert restored.skipped[0].path == new.id and "damaged" in restored.skipped[0].reason
    assert [event.kind for event in events] == ["skipped", "resumed"]
    fake.unloadable = dict.fromkeys(fake.checkpoints, "user")
    with pytest.raises(everstep.GroupError, match="None of the groups"):
        again.restore().result(GIVE_UP_SECONDS)


def test_unloadable_member_of_separate_processes_stops_the_job(
    fake: KeepingService, client: Any
) -> None:
    group = CheckpointGroup(client, "swarm", 2)
    clients = runs(client, 2)
    old, new = save(group, clients, 1), save(group, clients, 2)
    fake.unloadable = {new.members[1].path: "user"}
    mine = CheckpointGroup(client, "swarm", 2, "job-2").restore_member(0)
    restored = mine.result(GIVE_UP_SECONDS)
    assert restored is not None and len(restored.clients) == 1
    with pytest.raises(everstep.GroupError, match="can't be restored here"):
        CheckpointGroup(client, "swarm", 2, "job-2").restore_member(1).result(GIVE_UP_SECONDS)
    del fake.checkpoints[new.members[1].path]
    fallen = CheckpointGroup(client, "swarm", 2, "job-3").restore_member(0).result(GIVE_UP_SECONDS)
    assert fallen is not None and fallen.checkpoint == old


def test_member_with_a_damaged_state_does_not_count(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 2)
    saved = save(group, runs(client, 2), 1)
    metadata = fake.checkpoints[saved.members[0].path]["user_metadata"]
    metadata["everstep_loop_0"] = metadata["everstep_loop_0"].replace('"step":1', '"step":2')
    assert complete_steps(group) == []


def test_groups_survive_dropped_metadata(fake: KeepingService, client: Any) -> None:
    fake.drops_metadata = True
    group = CheckpointGroup(client, "swarm", 2)
    save(group, runs(client, 2), 7)
    restored = CheckpointGroup(client, "swarm", 2).restore().result(GIVE_UP_SECONDS)
    assert restored is not None and restored.states == (LoopState(7), LoopState(7))


def test_old_and_incomplete_groups_are_deleted_after_a_new_one(
    fake: KeepingService, client: Any
) -> None:
    clients = runs(client, 2)
    dead = CheckpointGroup(client, "swarm", 2, "dead", wait_seconds=1)
    with pytest.raises(everstep.GroupError):
        dead.save(1, clients[1], LoopState(9)).result(GIVE_UP_SECONDS)
    clients[0].save_state("mine").result(GIVE_UP_SECONDS)
    group = CheckpointGroup(client, "swarm", 2, "job-1", keep_last=2)
    for step in (10, 11, 12):
        save(group, clients, step)
    assert complete_steps(group) == [11, 12]
    assert "mine" in fake.names() and len(fake.names()) == 5


def test_late_member_gets_the_group_that_replaced_its_own(
    fake: KeepingService, client: Any
) -> None:
    """A member that doesn't wait saves again, and its earlier save is deleted in the meantime."""
    group = CheckpointGroup(client, "swarm", 2, "job-1", keep_last=1)
    first, second = runs(client, 2)
    held = Held()
    fake.script("/checkpoints", held)  # the second member's first listing
    late = group.save(1, second, LoopState(1))
    held.wait_for_arrival()
    for step in (1, 2):
        waiting = group.save(0, first, LoopState(step))
        if step == 2:
            group.save(1, second, LoopState(2)).result(GIVE_UP_SECONDS)
        waiting.result(GIVE_UP_SECONDS)
    assert complete_steps(group) == [2]
    held.release()
    assert late.result(GIVE_UP_SECONDS).step == 2


def test_members_load_is_retried_after_a_server_failure(fake: KeepingService, client: Any) -> None:
    group = CheckpointGroup(client, "swarm", 2)
    clients = runs(client, 2)
    for step in (1, 2):
        newest = save(group, clients, step)
    fake.script(
        "/retrieve_future",
        failed("the worker ended", "server"),
        where=fake.polls_of(None, "/load_weights"),
    )
    restored = CheckpointGroup(client, "swarm", 2).restore().result(GIVE_UP_SECONDS)
    assert restored is not None and restored.checkpoint == newest and not restored.skipped


def test_late_completion_does_not_make_a_group_newer(fake: KeepingService, client: Any) -> None:
    old = CheckpointGroup(client, "swarm", 2, "old")
    clients = runs(client, 4)
    waiting = old.save(0, clients[0], LoopState(100))
    fake.arrived("/save_weights")
    save(CheckpointGroup(client, "swarm", 2, "new"), clients[2:], 50)
    old.save(1, clients[1], LoopState(100)).result(GIVE_UP_SECONDS)
    waiting.result(GIVE_UP_SECONDS)
    assert complete_steps(old) == [100, 50]
    restored = CheckpointGroup(client, "swarm", 2).restore().result(GIVE_UP_SECONDS)
    assert restored is not None and restored.checkpoint.step == 50


def test_invalid_groups_are_rejected(client: Any) -> None:
    with pytest.raises(ValueError, match="1 to 999 members"):
        CheckpointGroup(client, "swarm", 0)
    with pytest.raises(ValueError, match="a run name is"):
        CheckpointGroup(client, "a.b", 2)
    with pytest.raises(ValueError, match="attempt"):
        CheckpointGroup(client, "swarm", 2, "")
    with pytest.raises(ValueError, match="keep_last"):
        CheckpointGroup(client, "swarm", 2, keep_last=0)
    group = CheckpointGroup(client, "swarm", 2)
    run = object.__new__(everstep.TrainingClient)
    with pytest.raises(ValueError, match="members 0 to 1; got 2"):
        group.save(2, run, LoopState())
    with pytest.raises(ValueError, match="got 1 clients"):
        group.save_all([run], LoopState())
    with pytest.raises(ValueError, match="have to save at the same step"):
        group.save_all([run, run], [LoopState(1), LoopState(2)])


saves = st.lists(
    st.tuples(
        st.sampled_from([1, 2]),  # step
        st.sampled_from(["a", "b"]),  # attempt
        st.integers(0, 2),  # index
        st.integers(1, 3),  # size
        st.booleans(),  # deleted again
    ),
    max_size=14,
)


@given(saves)
def test_group_is_complete_iff_each_index_exists_once(
    made: list[tuple[int, str, int, int, bool]],
) -> None:
    listed = []
    for number, (step, attempt, index, size, deleted) in enumerate(made):
        name = member_name("swarm", step, tag_of(attempt, ""), index, size)
        if not deleted:
            listed.append(
                types.Checkpoint(
                    checkpoint_id=f"weights/{name}",
                    checkpoint_type="training",
                    time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number),
                    tinker_path=f"tinker://run-{number}/weights/{name}",
                )
            )
    remaining = [each[:4] for each in made if not each[4]]
    expected = {
        (step, tag_of(attempt, ""), size)
        for step, attempt, _, size in remaining
        if sorted(i for s, a, i, z in remaining if (s, a, z) == (step, attempt, size))
        == list(range(size))
    }
    found = [each.complete() for each in partial_groups(listed, "swarm")]
    complete = [each for each in found if each is not None]
    assert {(each.step, each.tag, len(each.members)) for each in complete} == expected
    assert [each.time for each in complete] == sorted(each.time for each in complete)
