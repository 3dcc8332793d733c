"""Recovery: polls report why they wait, and runs come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.engine import Model
from everstep.runtime.execution.run_actor import RunActor
from everstep.runtime.execution.run_registry import RunRegistry
from tests.runtime.local import Local


def test_poll_reports_why_its_run_waits(home: Path, pico: Model) -> None:
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


def test_backlog_longer_than_a_page_executes_in_order(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        reference, run = service.new_run(), service.new_run()
        expected = service.train(reference, *range(40))
        with service.steps.shut():
            futures = [future for shift in range(40) for future in service.step(run, shift)]
        assert [service.result(future) for future in futures] == expected


def test_operations_that_arrive_in_reverse_execute_in_order(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        reference, run = service.new_run(), service.new_run()
        for _ in range(100):
            service.do(reference, "optim_step", adam_params={})
        futures = [
            service.send(run, "optim_step", seq_id, adam_params={}) for seq_id in range(100, 0, -1)
        ]
        steps = [service.result(future)["metrics"]["optimizer_step"] for future in futures]
        assert steps == [float(number) for number in range(100, 0, -1)]


def test_snapshot_being_written_does_not_block_the_run(home: Path, pico: Model) -> None:
    with Local(home, pico, replay_seconds=0.0) as service:
        run, reference = service.new_run(), service.new_run()
        service.train(run, 0)
        with service.writes.shut():
            assert service.train(run, 1) == service.train(reference, 0, 1)[2:]
    with service.after() as service:
        assert service.train(run, 2) == service.train(reference, 2)


def test_run_with_longest_backlog_is_started_first(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a run when the service starts."""
    begun: list[str] = []
    original = RunRegistry.get_or_create

    def get_or_create(registry: RunRegistry, run_id: str) -> RunActor:
        begun.append(run_id)
        return original(registry, run_id)

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
    monkeypatch.setattr(RunRegistry, "get_or_create", get_or_create)
    with service.after() as service:
        for future in futures:
            assert "error" not in service.result(future)
        back = [run for kind, run in service.finished if kind in ("create", "restore")]
    assert [runs[run] for run in dict.fromkeys(begun)] == [6, 4, 2]
    assert sorted(back) == sorted(runs)
