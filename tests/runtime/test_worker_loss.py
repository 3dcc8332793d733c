"""A worker's death: only the operation that it was executing is blamed."""

from __future__ import annotations

import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from everstep.backoff import Backoff
from everstep.engine import Model
from everstep.runtime.execution import run_actor
from everstep.runtime.workers import supervisor
from everstep.runtime.workers.ends import KILLS_PER_ATTEMPT
from everstep.runtime.workers.launch import killed_from_outside
from everstep.worker.checkpoint_io import write_checkpoint
from tests.runtime.local import Local, batch
from tests.runtime.test_samples import sampler, submit
from tests.runtime.test_snapshots import newest, snapshots
from tests.waiting import eventually


def test_bystander_succeeds_beside_an_operation_that_ends_every_worker(
    home: Path, pico: Model
) -> None:
    with Local(home, pico, worker_attempts=3) as service:
        poisoned, bystander = service.new_run(), service.new_run()
        in_flight: set[str] = set()
        deaths = 0

        def may_advance(kind: str, run: str) -> bool:
            """End the worker in the one run's pass, each time that both are in flight."""
            nonlocal deaths
            if kind != "pass" or deaths == 3:
                return True
            in_flight.add(run)
            if run == poisoned and bystander in in_flight:
                deaths += 1
                in_flight.clear()
                raise RuntimeError("this operation ends its worker")
            return False

        service.may_advance = may_advance
        asked = [
            service.send(run, "forward_backward", forward_backward_input=batch())
            for run in (poisoned, bystander)
        ]
        failed, succeeded = (service.result(each) for each in asked)
        assert deaths == 3
        assert "The worker ended 3 times" in failed["error"]
        assert failed["category"] == "server"
        assert succeeded["metrics"]


def test_unblamed_ends_do_not_count_against_a_sample(home: Path, pico: Model) -> None:
    with Local(home, pico, worker_attempts=2) as service:
        run, name = service.new_run(), sampler(service)
        in_flight: set[str] = set()
        ends: list[str] = []

        def may_advance(kind: str, _: str) -> bool:
            """End the worker twice in the pass beside the sample, then in the sample."""
            if kind not in ("pass", "sample"):
                return True
            in_flight.add(kind)
            victim = "pass" if len(ends) < 2 else "sample"
            if kind == victim and (victim == "sample" or len(in_flight) == 2):
                ends.append(kind)
                in_flight.clear()
                raise RuntimeError("this ends the worker")
            return False

        service.may_advance = may_advance
        sample = submit(service, name)
        given_up = service.do(run, "forward_backward", forward_backward_input=batch())
        assert "The worker ended 2 times" in given_up["error"]
        failed = service.result(sample)
        assert "The worker ended 2 times while it executed this sample" in failed["error"]
        assert ends == ["pass", "pass", "sample", "sample"]


@pytest.mark.parametrize("phase", ["capture", "write"])
def test_snapshot_that_ends_every_worker_is_given_up(
    home: Path, tmp_path: Path, pico: Model, phase: str
) -> None:
    with Local(tmp_path / "uninterrupted", pico) as other:
        expected = other.train(other.new_run(), *range(4))
    with Local(home, pico, replay_seconds=0.0, worker_attempts=3) as service:
        ends: list[str] = []

        def may_advance(kind: str, _: str) -> bool:
            if kind == "save":
                ends.append(kind)
                raise RuntimeError("this ends the worker")
            return True

        def write(*_: Any) -> dict[str, Any]:
            ends.append("write")
            service.crash_worker()

        if phase == "capture":
            service.may_advance = may_advance
        service.write_checkpoint = write
        run = service.new_run()
        assert service.train(run, *range(4)) == expected
        service.may_advance = lambda kind, run: True
        assert len(ends) == 3
        assert snapshots(home, run) == []


def test_evictions_that_end_every_worker_are_given_up(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_SECONDS", 0.0)  # every worker is replaced at once
    with Local(home, pico, worker_attempts=2) as service:
        ends: list[str] = []

        def write(*_: Any) -> dict[str, Any]:
            ends.append("write")
            service.crash_worker()

        service.write_checkpoint = write
        run, reference = service.new_run(), service.new_run()
        expected, seen = service.train(reference, *range(4)), service.train(run, 0)
        for step in range(1, 4):
            service.result(service.post("unload_model", model_id=run)["request_id"])
            seen += service.train(run, step)
        assert seen == expected
        assert len(ends) == 2
        service.write_checkpoint = write_checkpoint


def test_replay_that_ended_its_worker_too_often_is_tried_again(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_SECONDS", 0.0)  # every worker is replaced at once
    monkeypatch.setattr(run_actor, "_RETRY", Backoff(initial=0.01, max=0.01))
    with Local(home, pico).killed() as service:
        run = service.new_run()
        service.train(run, 0)
    ends: list[str] = []

    def may_advance(kind: str, _: str) -> bool:
        if kind == "pass" and len(ends) < 5:
            ends.append(kind)
            raise RuntimeError("something ends the worker")
        return True

    with service.after(worker_attempts=2) as service:
        service.may_advance = may_advance
        assert "error" not in service.do(run, "optim_step", adam_params={})
    assert len(ends) == 5


def test_durable_snapshot_resets_the_count_of_fatal_ones(home: Path, pico: Model) -> None:
    with Local(home, pico, replay_seconds=0.0, worker_attempts=2) as service:
        writes: list[bool] = []

        def write(*arguments: Any) -> dict[str, Any]:
            writes.append(len(writes) % 2 == 0)
            if writes[-1]:
                service.crash_worker()
            return write_checkpoint(*arguments)

        service.write_checkpoint = write
        run = service.new_run()
        for step in range(3):
            service.train(run, step)
            eventually(
                "a snapshot after the step",
                lambda step=step: newest(home, run) == 2 * step + 2,
            )
    assert sum(writes) >= 3, "more ends than are tolerated in a row"


def test_save_whose_files_end_every_worker_fails(home: Path, pico: Model) -> None:
    with Local(home, pico, worker_attempts=3) as service:
        ends: list[str] = []

        def write(*_: Any) -> dict[str, Any]:
            ends.append("write")
            service.crash_worker()

        run = service.new_run()
        service.train(run, 0)
        service.write_checkpoint = write
        failed = service.do(run, "save_weights", path="a")
        assert "The worker ended 3 times" in failed["error"]
        assert ends == ["write"] * 3
        service.write_checkpoint = write_checkpoint
        assert "error" not in service.do(run, "save_weights", path="b")


@pytest.mark.parametrize("kind", ["pass", "sample"])
def test_kills_from_outside_count_as_a_part_of_an_attempt(
    home: Path, pico: Model, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_SECONDS", 0.0)  # every worker is replaced at once
    monkeypatch.setattr(run_actor, "_BACKOFF", Backoff(initial=0.001, max=0.001))
    with Local(home, pico, worker_attempts=2) as service:
        run, name = service.new_run(), sampler(service)
        ends: list[int] = []
        numbers = count()
        end_with, limit = signal.SIGKILL, 2 * KILLS_PER_ATTEMPT - 1

        def may_advance(executing: str, _: str) -> bool:
            if executing == kind and len(ends) < limit:
                ends.append(end_with)
                service.lose_worker(end_with)
                raise RuntimeError("it has ended")
            return True

        def ask() -> Any:
            if kind == "sample":
                return service.result(submit(service, name, seq_id=next(numbers)))
            return service.do(run, "forward", forward_input=batch())  # it is never replayed

        service.may_advance = may_advance
        assert "error" not in ask()
        assert len(ends) == limit
        ends.clear()
        limit += 1
        assert f"The worker ended {limit} times" in ask()["error"]
        ends.clear()
        end_with = signal.SIGSEGV
        assert "The worker ended 2 times" in ask()["error"]


def test_lack_of_memory_and_a_hang_are_no_kills_from_outside() -> None:
    outside = {"hung": False, "out_of_memory": False}
    for number in (signal.SIGKILL, signal.SIGTERM):
        assert killed_from_outside(-number, **outside)
        assert not killed_from_outside(-number, **{**outside, "out_of_memory": True})
        assert not killed_from_outside(-number, **{**outside, "hung": True})
    assert not any(killed_from_outside(code, **outside) for code in (0, 1, None, -signal.SIGSEGV))
