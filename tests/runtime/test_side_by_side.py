"""Concurrency: saves beside training, runs beside runs, and more runs than memory holds.

Gates make every order, or it is the order in which the worker finished its calls.
"""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.engine import Model
from everstep.runtime.execution.run import Run
from everstep.runtime.execution.run_actor import RunActor
from everstep.worker.round_robin import RoundRobin
from tests.runtime.local import Gate, Local, batch
from tests.waiting import eventually, eventually_async


@pytest.mark.parametrize("route", ["save_weights", "save_weights_for_sampler"])
def test_save_is_written_during_training_and_holds_state_of_its_seq_id(
    home: Path, pico: Model, route: str
) -> None:
    with Local(home, pico, poll_seconds=0.02) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1, 2)
        seen = service.train(run, 0)
        with service.writes.shut():
            saving = service.send(run, route, path="a")
            seen += service.train(run, 1, 2)  # these are finished, and the save is not
            service.writes.wait_reached()
            assert service.poll(saving).status_code == 408
            assert service.http.get(f"training_runs/{run}/checkpoints").json()["checkpoints"] == []
        path = service.result(saving)["path"]
        assert seen == expected
        service.do(run, "load_weights", path=path, optimizer=route == "save_weights")
        assert service.train(run, 1)[0] == expected[2], "the loss right after the save's place"


def test_saves_are_written_in_order_with_their_own_states(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        seen, saves = [], []
        with service.writes.shut():
            for step in range(3):
                seen.append(service.train(run, step))
                saves.append(service.send(run, "save_weights", path=f"s{step}"))
        paths = [service.result(each)["path"] for each in saves]
        for step, path in enumerate(paths[:-1]):
            service.do(run, "load_weights", path=path, optimizer=True)
            assert service.train(run, step + 1) == seen[step + 1]


def test_short_pass_does_not_wait_for_long_one_of_another_run(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        long_run, short_run, reference = service.new_run(), service.new_run(), service.new_run()
        tokens = [i % 250 for i in range(1025)]
        inputs = {"target_tokens": {"data": tokens[1:], "dtype": "int64"}}
        datum = {"model_input": {"chunks": [{"tokens": tokens[:-1]}]}, "loss_fn_inputs": inputs}
        long_pass = {"data": [datum] * 12, "loss_fn": "cross_entropy"}  # six micro-batches
        service.finished.clear()
        with service.steps.shut():
            first = service.send(long_run, "forward_backward", forward_backward_input=long_pass)
            service.steps.wait_reached()  # it has begun
            others = service.step(short_run, 0)
        assert [service.result(each) for each in others] == service.train(reference, 0)
        service.result(first)
        assert [run for kind, run in service.finished if run != reference] == [
            short_run,
            short_run,
            long_run,
        ]


def test_round_robin_alternates_lanes_and_keeps_each_lanes_order() -> None:
    seen: list[str] = []

    def task(name: str, steps: int) -> Any:
        for step in range(steps):
            seen.append(f"{name}{step}")
            yield

    turns = RoundRobin()
    turns.add("a", 1, task("long", 4))
    turns.add("a", 2, task("next", 1))
    turns.add("b", 3, task("short", 1))
    turns.add("c", 4, task("other", 2))
    while turns.busy:
        turns.step()
    assert seen == [
        *("long0", "short0", "other0"),
        *("long1", "other1"),
        *("long2", "long3", "next0"),
    ]


def test_runs_beyond_memory_are_evicted_with_same_numbers(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        alone = [service.new_run(seed) for seed in range(3)]
        expected = [service.train(run, *range(3)) for run in alone]
    with service.after(memory_bytes=1) as service:
        runs = [service.new_run(seed) for seed in range(3)]
        seen: list[list[Any]] = [[] for _ in runs]
        for step in range(3):
            for number, run in enumerate(runs):
                seen[number] += service.train(run, step)
        assert seen == expected
        evicted = [run for kind, run in service.finished if kind == "drop"]
        assert set(evicted) >= set(runs)


def test_evicted_runs_keep_nothing_in_the_service_and_come_back_exactly(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as service:
        alone = [service.new_run(seed) for seed in range(4)]
        expected = [service.train(run, 0, 1) for run in alone]
    with service.after(idle_seconds=0.1) as service:
        runs = [service.new_run(seed) for seed in range(4)]
        seen = [service.train(run, 0) for run in runs]
        registry = service.app.state.runtime._scheduler.runs
        portal = service.http.portal
        assert portal is not None

        def nothing_is_kept() -> bool:
            gc.collect()
            kept = [each for each in gc.get_objects() if type(each) in (Run, RunActor)]
            tasks = [each.get_name() for each in portal.call(asyncio.all_tasks)]
            return not (kept or any(run in name for name in tasks for run in runs))

        eventually("all are evicted", lambda: not any(map(registry.find, runs)))
        eventually("nothing of them is kept", nothing_is_kept)
        assert [seen[i] + service.train(run, 1) for i, run in enumerate(runs)] == expected


def test_operation_that_arrives_during_an_eviction_is_executed(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        expected, seen = service.train(reference, 0, 1), service.train(run, 0)
        registry, portal = service.app.state.runtime._scheduler.runs, service.http.portal
        assert portal is not None
        actor = registry.find(run)
        eventually("it rests", lambda: bool(actor.idle))
        with service.writes.shut():
            evicting = portal.start_task_soon(registry.unload, run)
            service.writes.wait_reached()
            requests = service.step(run, 1)
        assert evicting.result()
        assert seen + [service.result(each) for each in requests] == expected
        assert registry.find(run) is actor, "it had something to do"


def test_operation_whose_run_is_forgotten_before_it_is_dispatched_is_executed(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        expected, seen = service.train(reference, 0, 1), service.train(run, 0)
        runtime = service.app.state.runtime
        registry, accept = runtime._scheduler.runs, runtime._ledger.accept
        actor = registry.find(run)
        eventually("it rests", lambda: bool(actor.idle))

        async def accept_and_evict(*arguments: Any, **named: Any) -> Any:
            accepted = await accept(*arguments, **named)
            assert await registry.unload(run)
            await eventually_async("it is forgotten", lambda: registry.find(run) is None)
            return accepted

        with mock.patch.object(runtime._ledger, "accept", accept_and_evict):
            request = service.send(run, "forward_backward", forward_backward_input=batch(1))
        seen.append(service.result(request))
        assert registry.find(run) not in (None, actor)
        optim = {"learning_rate": 0.01, "weight_decay": 0.1}
        seen.append(service.do(run, "optim_step", adam_params=optim))
        assert seen == expected


def test_unloaded_run_is_forgotten(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        registry = service.app.state.runtime._scheduler.runs
        eventually("it rests", lambda: bool(registry.find(run).idle))
        service.result(service.post("unload_model", model_id=run)["request_id"])
        eventually("it is forgotten", lambda: registry.find(run) is None)


def test_run_unloaded_between_pass_and_step_comes_back_exactly(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1)
        seen = service.train(run, 0)
        seen.append(service.do(run, "forward_backward", forward_backward_input=batch(1)))
        answer = service.result(service.post("unload_model", model_id=run)["request_id"])
        assert answer["model_id"] == run
        assert service.finished[-1] == ("drop", run)
        step = {"adam_params": {"learning_rate": 0.01, "weight_decay": 0.1}}
        seen.append(service.do(run, "optim_step", **step))
        assert seen == expected
        assert ("restore", run) in service.finished
        assert service.train(run, 2) == service.train(reference, 2)


def test_slow_fsync_does_not_block_training(home: Path, pico: Model) -> None:
    gate, fsync = Gate(), os.fsync

    def slow(handle: int) -> None:
        gate.pass_through()
        fsync(handle)

    with Local(home, pico) as service:
        run, reference = service.new_run(), service.new_run()
        expected = service.train(reference, 0, 1, 2)
        seen = service.train(run, 0)
        with mock.patch("everstep.vault.storage.local.os.fsync", slow), gate.shut():
            save = service.send(run, "save_weights", path="slow")
            gate.wait_reached()
            seen += service.train(run, 1)
            assert service.http.get(f"training_runs/{run}/checkpoints").json()["checkpoints"] == []
        assert service.result(save)["path"] == f"tinker://{run}/weights/slow"
        assert seen + service.train(run, 2) == expected
