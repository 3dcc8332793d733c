"""Too little memory: other runs are evicted, and a run that can't be brought back waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.engine import Model, forward_backward
from tests.runtime.local import Local, batch
from tests.waiting import eventually

Memory = list[Callable[[], bool]]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, pico: Model) -> Iterator[Memory]:
    """Functions that say whether there is memory, for the next state and for the next pass."""
    given: Memory = [lambda: True, lambda: True]
    new_run = pico.new_run

    def check(number: int) -> None:
        if not given[number]():
            raise torch.OutOfMemoryError("CUDA out of memory")

    def limited_run(*arguments: Any, **settings: Any) -> Any:
        check(0)
        return new_run(*arguments, **settings)

    def limited_pass(*arguments: Any, **settings: Any) -> Any:
        check(1)
        return (yield from forward_backward(*arguments, **settings))

    monkeypatch.setattr(pico, "new_run", limited_run)
    monkeypatch.setattr("everstep.worker.commands.forward_backward", limited_pass)
    yield given


def resident(service: Local) -> int:
    return len(service.commands._runs)


def dropped(service: Local) -> list[str]:
    return [run for kind, run in service.finished if kind == "drop"]


def test_runs_that_a_device_has_no_room_for_evict_others_with_same_numbers(
    home: Path, pico: Model, fits: Memory
) -> None:
    with Local(home, pico) as service:
        expected = [service.train(service.new_run(seed), *range(3)) for seed in range(3)]
        for run in list(service.commands._runs):
            service.result(service.post("unload_model", model_id=run)["request_id"])
        assert resident(service) == 0
        fits[0] = lambda: resident(service) < 2
        runs = [service.new_run(seed) for seed in range(3)]
        assert dropped(service)[-1] == runs[0], "the one that was used least recently"
        seen: list[list[Any]] = [[] for _ in runs]
        for step in range(3):
            for number, run in enumerate(runs):
                seen[number] += service.train(run, step)
                assert resident(service) <= 2
        assert seen == expected


def test_pass_without_room_evicts_another_run(home: Path, pico: Model, fits: Memory) -> None:
    with Local(home, pico) as service:
        other, run, reference = (service.new_run() for _ in range(3))
        expected = service.train(reference, 0)
        fits[1] = lambda: resident(service) < 2
        assert service.train(run, 0) == expected
        assert dropped(service) == [other, reference]


def test_pass_without_room_comes_before_the_step_that_was_sent_behind_it(
    home: Path, pico: Model, fits: Memory
) -> None:
    with Local(home, pico) as service:
        other, run, reference = (service.new_run() for _ in range(3))
        expected = service.train(reference, 0, 1)
        fits[1] = lambda: resident(service) < 3
        before = len(service.received)
        with service.steps.shut():
            futures = [each for shift in (0, 1) for each in service.step(run, shift)]
            eventually("a step is sent behind", lambda: len(service.received) == before + 2)
        assert [service.result(each) for each in futures] == expected
        assert dropped(service) == [other]


def test_pass_too_large_for_the_device_fails_and_changes_nothing(
    home: Path, pico: Model, fits: Memory
) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0)
        fits[1] = lambda: False
        failed = service.do(run, "forward_backward", forward_backward_input=batch())
        assert failed["category"] == "server"
        assert "not enough memory" in failed["error"]
        fits[1] = lambda: True
        assert service.train(run, 0) == expected


@pytest.mark.parametrize("number", [0, 1])
def test_run_that_is_not_brought_back_for_lack_of_memory_waits_and_is_not_corrupted(
    number: int, home: Path, pico: Model, fits: Memory
) -> None:
    with Local(home, pico).killed() as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1)
        assert service.train(run, 0) == expected[:2]
    fits[number] = lambda: False  # neither for its state, or not for a pass that is replayed
    with service.after(poll_seconds=0.02) as service:
        futures = service.step(run, 1)
        while "memory" not in (waiting := service.poll(futures[0])).json()["queue_state_reason"]:
            assert waiting.status_code == 408
        assert "waits for memory" in waiting.json()["queue_state_reason"]
        fits[number] = lambda: True
        assert [service.result(future) for future in futures] == expected[2:]


def test_budget_is_that_of_the_device_unless_it_is_set(home: Path, pico: Model) -> None:
    for memory_bytes, evicts in ((None, True), (1 << 40, False)):
        service = Local(home / str(evicts), pico, memory_bytes=memory_bytes)
        service.state_bytes = 1
        with service:
            runs = [service.new_run(seed) for seed in range(3)]
            for run in runs:
                service.train(run, 0)
            assert bool(dropped(service)) == evicts
