"""What a restart has to replay is bounded over all runs together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from everstep.engine import Model
from everstep.runtime.execution.replay_budget import ReplayBudget
from everstep.worker.checkpoint_io import write_checkpoint
from tests.runtime.local import Local, batch
from tests.runtime.test_snapshots import newest, snapshots
from tests.waiting import eventually


@pytest.mark.parametrize("bound", [5, 11])
def test_many_runs_that_train_owe_no_more_than_the_bound_in_all(
    home: Path, pico: Model, bound: int
) -> None:
    steps = 4
    with Local(home, pico, replay_seconds=bound).killed() as service:
        service.seconds = 1.0
        runs = [service.new_run() for _ in range(6)]
        for step in range(steps):
            for run in runs:
                service.train(run, step)
                done = {each: 2 * (step + (each in runs[: runs.index(run) + 1])) for each in runs}
                eventually(
                    "snapshots that keep the bound",
                    lambda done=done: (
                        sum(count - newest(home, each) for each, count in done.items()) <= bound
                    ),
                )
    with service.after() as service:
        for run in runs:
            assert "error" not in service.do(run, "optim_step", adam_params={})
        applied = [kind for kind, _ in service.finished if kind in ("pass", "optim_step")]
    assert len(applied) - len(runs) <= bound


def owed(home: Path, done: Mapping[str, int]) -> int:
    """How many of the operations that runs have executed a restart would replay."""
    return sum(count - newest(home, run) for run, count in done.items())


def test_idle_runs_count_towards_the_bound_after_a_crash(home: Path, pico: Model) -> None:
    bound = 5
    with Local(home, pico, replay_seconds=bound).killed() as service:
        service.seconds = 1.0
        done = {service.new_run(): 2 for _ in range(2)}
        for run in done:
            service.train(run, 0)
    assert owed(home, done) == 4
    with service.after(replay_seconds=bound).killed() as second:
        second.seconds = 1.0
        third = second.new_run()
        second.train(third, 0)  # the sum is 6 now, of which 4 are of runs that nobody touches
        done[third] = 2
        eventually("a replay within the bound", lambda: owed(home, done) <= bound)
    left = owed(home, done)
    with second.after() as last:
        for run in done:
            assert "error" not in last.do(run, "optim_step", adam_params={})
        applied = [kind for kind, _ in last.finished if kind in ("pass", "optim_step")]
    assert len(applied) - len(done) == left > 0


def test_start_snapshots_idle_runs_until_the_rest_is_within_the_bound(
    home: Path, pico: Model
) -> None:
    with Local(home, pico).killed() as service:
        service.seconds = 1.0
        done = {service.new_run(): 2 * steps for steps in (1, 2, 3)}
        for run, operations in done.items():
            service.train(run, *range(operations // 2))
    assert owed(home, done) == 12
    with service.after(replay_seconds=6).killed():
        eventually("a replay of 6 s", lambda: owed(home, done) <= 6)
    assert [newest(home, run) for run in done] == [0, 0, 6], "the one that costs most"


def test_idle_run_that_saved_its_state_owes_what_came_after_the_save(
    home: Path, pico: Model
) -> None:
    with Local(home, pico).killed() as service:
        service.seconds = 1.0
        saved, other = service.new_run(), service.new_run()
        service.train(saved, 0, 1)
        assert "error" not in service.do(saved, "save_weights", path="a")
        service.train(other, 0)
    with service.after(replay_seconds=2).killed() as second:
        second.seconds = 1.0
        second.train(other, 1)  # a snapshot is taken in the course of the replay, and one due
        eventually("a snapshot at 4", lambda: newest(home, other) == 4)
    assert newest(home, saved) == 0, "its checkpoint is a state to restore"


def test_snapshot_that_is_lost_while_its_run_is_idle_is_taken_again(
    home: Path, pico: Model
) -> None:
    def lost(*_: Any) -> NoReturn:
        raise SystemExit

    with Local(home, pico, replay_seconds=0.0) as service:
        run = service.new_run()
        service.write_checkpoint = lost
        service.writes.close()
        service.do(run, "forward_backward", forward_backward_input=batch())
        service.writes.wait_reached()
        service.write_checkpoint = write_checkpoint
        service.lose_worker()
        service.writes.open()
        eventually("a snapshot, without an operation", lambda: newest(home, run) == 1)


def test_forward_costs_no_replay(home: Path, pico: Model) -> None:
    with Local(home, pico, replay_seconds=5) as service:
        service.seconds = 1.0
        run = service.new_run()
        service.train(run, 0)
        for shift in range(8):
            assert "error" not in service.do(run, "forward", forward_input=batch(shift))
        service.train(run, 1, 2)
        eventually("a snapshot", lambda: newest(home, run) > 0)
        first = snapshots(home, run)[0]
    assert first.position == 14, "after six passes and steps"


def test_the_run_with_the_largest_cost_is_due_first() -> None:
    due: list[str] = []
    budget = ReplayBudget(10.0, due.append)
    for run_id, seconds in (("a", 2.0), ("b", 5.0), ("c", 3.0)):
        budget.add(run_id, seconds)
    assert due == []
    budget.add("a", 1.0)
    assert due == ["b"]
    assert budget.total == 6.0
    assert budget.is_due("b") and not budget.is_due("a")


def test_a_run_is_not_due_again_while_its_snapshot_is_written() -> None:
    due: list[str] = []
    budget = ReplayBudget(10.0, due.append)
    budget.add("a", 11.0)
    budget.begin_write("a")
    assert budget.total == 0.0
    budget.add("b", 4.0)
    budget.add("a", 8.0)
    assert due == ["a", "b"], "the largest that no snapshot is written of"
    budget.add("a", 8.0)
    assert not budget.is_due("a")
    budget.end_write("a")
    assert due == ["a", "b", "a"]
    assert budget.is_due("a")


def test_snapshot_in_the_course_of_a_replay_leaves_the_rest_to_be_replayed() -> None:
    due: list[str] = []
    budget = ReplayBudget(10.0, due.append)
    budget.reset("a", 12.0)
    budget.begin_write("a", 11.0)
    assert budget.total == 11.0
    assert due == ["a"]
    budget.end_write("a")
    assert due == ["a", "a"] and budget.is_due("a")


def test_seeded_cost_counts_unless_the_run_is_in_use() -> None:
    due: list[str] = []
    budget = ReplayBudget(10.0, due.append)
    budget.reset("restored", 0.0)
    budget.add("used", 1.0)
    budget.seed({"restored": 50.0, "used": 50.0, "idle": 8.0})
    assert budget.total == 9.0
    budget.add("used", 2.0)
    assert due == ["idle"]


def test_restored_run_stays_due_until_it_is_snapshotted() -> None:
    due: list[str] = []
    budget = ReplayBudget(10.0, due.append)
    budget.seed({"a": 11.0})
    budget.reset("a", 11.0)
    assert due == ["a"] and budget.is_due("a")
    budget.begin_write("a")
    budget.end_write("a")
    assert not budget.is_due("a")


def test_a_run_that_has_ended_owes_nothing() -> None:
    budget = ReplayBudget(10.0, lambda _: None)
    budget.add("a", 11.0)
    budget.clear("a")
    assert not budget.is_due("a")
    assert budget.total == 0.0
