"""While runs are brought back: polls say why they wait, and what comes back is what was there."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.engine import Model
from everstep.runtime.actors import Actors
from everstep.runtime.run_actor import RunActor
from tests.runtime.local import Local


def test_a_poll_is_told_why_its_run_waits(home: Path, pico: Model) -> None:
    with Local(home, pico, poll_seconds=0.02) as service:
        run = service.new_run()
        service.train(run, 0, 1)
    with service.after(poll_seconds=0.02) as service:
        with service.steps.shut():
            future = service.send(run, "optim_step", adam_params={})
            waiting = service.poll(future)
            while waiting.json()["queue_state"] == "active":  # the run's task has not begun
                waiting = service.poll(future)
            assert waiting.status_code == 408
            assert waiting.json()["queue_state"] == "paused_capacity"
            assert "brought back" in waiting.json()["queue_state_reason"]
        assert service.result(future)["metrics"]["optimizer_step"] == 3.0


def test_a_run_with_a_longer_backlog_than_a_page_goes_on_in_order(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        twin, run = service.new_run(), service.new_run()
        expected = service.train(twin, *range(40))
        with service.steps.shut():
            futures = [future for shift in range(40) for future in service.step(run, shift)]
        assert [service.result(future) for future in futures] == expected


def test_operations_that_arrive_backwards_are_executed_in_order(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        twin, run = service.new_run(), service.new_run()
        for _ in range(100):
            service.do(twin, "optim_step", adam_params={})
        futures = [
            service.send(run, "optim_step", seq_id, adam_params={}) for seq_id in range(100, 0, -1)
        ]
        steps = [service.result(future)["metrics"]["optimizer_step"] for future in futures]
        assert steps == [float(number) for number in range(100, 0, -1)]


def test_a_snapshot_that_is_behind_does_not_hold_up_the_run(home: Path, pico: Model) -> None:
    with Local(home, pico, replay_seconds=0.0) as service:
        run, twin = service.new_run(), service.new_run()
        service.train(run, 0)
        with service.writes.shut():
            assert service.train(run, 1) == service.train(twin, 0, 1)[2:]
    with service.after() as service:
        assert service.train(run, 2) == service.train(twin, 2)


def test_runs_come_back_side_by_side_and_a_short_recovery_does_not_wait_for_a_long_one(
    home: Path, pico: Model
) -> None:
    with Local(home, pico).killed() as service:
        short, long = service.new_run(), service.new_run()
        service.train(long, *range(30))
        service.train(short, 0)
    with service.after() as service:
        with service.steps.shut():
            slow = service.send(long, "optim_step", adam_params={})
            quick = service.send(short, "optim_step", adam_params={})
        assert service.result(quick)["metrics"]["optimizer_step"] == 2.0
        assert service.result(slow)["metrics"]["optimizer_step"] == 31.0
        steps = [run for kind, run in service.finished if kind == "optim_step"]
    assert steps.index(short) < 10, "it is replayed while the other one is"
    assert steps[-1] == long


def test_the_busiest_run_is_brought_back_first(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun with; as they come back side by side, another may be through sooner."""
    begun: list[str] = []
    original = Actors.of

    def of(actors: Actors, run_id: str) -> RunActor:
        begun.append(run_id)
        return original(actors, run_id)

    waiting = {"a little": 2, "the most": 6, "less": 4}
    with Local(home, pico, shutdown_seconds=0.01) as service:
        runs = {service.new_run(): count for count in waiting.values()}
        for run in runs:
            service.train(run, 0)
        service.steps.close()  # until it ends
        futures = [
            service.send(run, "optim_step", adam_params={})
            for run, count in runs.items()
            for _ in range(count)
        ]
    monkeypatch.setattr(Actors, "of", of)
    with service.after() as service:
        for future in futures:
            assert "error" not in service.result(future)
        back = [run for kind, run in service.finished if kind in ("create", "restore")]
    assert [runs[run] for run in dict.fromkeys(begun)] == [6, 4, 2]
    assert sorted(back) == sorted(runs)
