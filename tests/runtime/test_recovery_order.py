"""After a restart, the run that a client waits for is brought back first, whole, then the next."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from everstep.engine import Model
from everstep.runtime.execution.recovery_queue import RecoveryQueue
from tests.runtime.local import Local
from tests.runtime.test_samples import sampler, submit
from tests.waiting import eventually

REPLAYED = ("pass", "optim_step")


def killed_with_pending(home: Path, pico: Model, runs: int, steps: int) -> tuple[Local, list[str]]:
    """A service that was killed: each run has steps to replay, and one operation that waits.

    Returns:
        The next service on its home, whose worker makes no step until `steps.open()`, and the
        future of each run's operation.
    """
    with Local(home, pico, shutdown_seconds=0.01).killed() as service:
        ids = [service.new_run() for _ in range(runs)]
        for run in ids:
            service.train(run, *range(steps))
        service.steps.close()  # until it ends
        futures = [service.send(run, "optim_step", adam_params={}) for run in ids]
    following = service.after(poll_seconds=0.02)
    following.steps.close()
    return following, futures


def served(service: Local) -> list[str]:
    """The run of each operation that was executed or replayed, in order."""
    return [run for kind, run in service.finished if kind in REPLAYED]


def test_a_waiting_client_gets_its_result_before_any_other_run_is_replayed(
    home: Path, pico: Model
) -> None:
    service, futures = killed_with_pending(home, pico, runs=20, steps=1)
    with service:
        assert service.poll(futures[13]).status_code == 408
        service.steps.open()
        result = service.result(futures[13])
        before = served(service)
        assert result["metrics"]["optimizer_step"] == 2.0
        for future in futures:
            assert "error" not in service.result(future)
    own = before[0]
    assert own.endswith(":train:13")
    assert before[:3] == [own] * 3, "two operations replayed, one executed"
    assert len(set(served(service))) == 20


def test_the_client_that_waited_longest_is_served_first(home: Path, pico: Model) -> None:
    service, futures = killed_with_pending(home, pico, runs=6, steps=2)
    waited_for = [4, 1, 3]
    with service:
        for number in waited_for:
            assert service.poll(futures[number]).status_code == 408
        service.steps.open()
        for future in futures:
            assert "error" not in service.result(future)
    done = served(service)
    order = [int(run.rpartition(":")[2]) for run in done]
    assert order[:15] == [number for number in waited_for for _ in range(5)], "each one whole"
    assert sorted(order[15:]) == [n for n in (0, 2, 5) for _ in range(5)]


def test_a_new_operation_puts_its_run_before_those_that_nobody_waits_for(
    home: Path, pico: Model
) -> None:
    service, futures = killed_with_pending(home, pico, runs=4, steps=2)
    run = next(iter(service._sequence))  # the first; the other runs have as much to replay
    with service:
        future = service.send(run, "optim_step", adam_params={})
        service.steps.open()
        assert service.result(future)["metrics"]["optimizer_step"] == 4.0
        for each in futures:
            assert "error" not in service.result(each)
    assert served(service)[:5] == [run] * 5


def test_a_client_that_begins_to_wait_pauses_the_recovery_of_a_run_that_nobody_waits_for(
    home: Path, pico: Model
) -> None:
    service, futures = killed_with_pending(home, pico, runs=4, steps=3)
    held, reached = threading.Event(), threading.Event()

    def may_advance(kind: str, _: str) -> bool:
        """Hold the third replayed operation back until a client waits for another run."""
        if kind in REPLAYED and len(served(service)) == 2 and not held.is_set():
            reached.set()
            return False
        return True

    service.may_advance = may_advance
    with service:
        service.steps.open()
        assert reached.wait(60)
        assert service.poll(futures[2]).status_code == 408
        held.set()
        for future in futures:
            assert "error" not in service.result(future)
    order = [int(run.rpartition(":")[2]) for run in served(service)]
    assert sorted(order[:10]) == [0] * 3 + [2] * 7, "paused before its next operation"
    assert sorted(order[10:]) == [0] * 4 + [1] * 7 + [3] * 7


def test_runs_come_back_after_a_workers_death_in_the_order_in_which_clients_wait(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as service:
        runs = [service.new_run() for _ in range(4)]
        for run in runs:
            service.train(run, 0)
        waited_for = [2, 0, 3]
        service.steps.close()
        futures = [service.send(runs[n], "optim_step", adam_params={}) for n in waited_for]
        service.finished.clear()
        service.lose_worker()
        service.steps.open()
        for future in futures:
            assert "error" not in service.result(future)
        assert served(service) == [runs[n] for n in waited_for for _ in range(3)], "each one whole"
        assert "error" not in service.do(runs[1], "optim_step", adam_params={})


def test_run_that_got_a_result_comes_back_behind_one_that_got_none(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        busy, stuck = (service.new_run() for _ in range(2))
        service.finished.clear()
        service.may_advance = lambda kind, run: (
            kind not in REPLAYED or (run == busy and not served(service))
        )
        with service.steps.shut():
            first, *rest = (
                service.send(run, "optim_step", adam_params={}) for run in (busy, busy, stuck)
            )
        service.result(first)
        queue = service.app.state.runtime._scheduler.runs.find(busy)._context.recovery
        eventually("the run waits anew", lambda: queue._wanted[busy] > queue._wanted[stuck])
        with service.loading.shut():
            service.lose_worker()
            eventually("both come back", lambda: busy in queue and stuck in queue)
        service.may_advance = lambda kind, run: True
        for future in rest:
            assert "error" not in service.result(future)
        assert served(service) == [busy, stuck, busy, busy]


def test_run_whose_save_was_lost_comes_back_before_those_that_waited_less(
    home: Path, pico: Model
) -> None:
    with Local(home, pico) as service:
        runs = [service.new_run() for _ in range(2)]
        for run in runs:
            service.train(run, 0)
        service.writes.close()
        saved = service.send(runs[1], "save_weights", path="a")
        service.writes.wait_reached()
        actor = service.app.state.runtime._scheduler.runs.find(runs[1])
        eventually("all is executed but the save", lambda: actor.idle)
        service.steps.close()
        step = service.send(runs[0], "optim_step", adam_params={})
        service.finished.clear()
        service.lose_worker()
        service.writes.open()
        service.steps.open()
        assert "error" not in service.result(saved)
        assert "error" not in service.result(step)
        assert served(service) == [runs[1]] * 2 + [runs[0]] * 3


def test_sample_continues_while_runs_are_brought_back(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        service.train(run, 0)
        name = sampler(service)
        service.steps.close()
        sample = submit(service, name)
        step = service.send(run, "optim_step", adam_params={})
        service.may_advance = lambda kind, _: kind not in REPLAYED
        service.lose_worker()
        service.steps.open()
        assert "error" not in service.result(sample)
        service.may_advance = lambda kind, _: True
        assert "error" not in service.result(step)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await test()

    asyncio.run(run())


def test_a_run_that_nobody_waits_for_pauses_for_one_that_a_client_waits_for() -> None:
    async def test() -> None:
        queue, done = RecoveryQueue(), list[str]()

        async def recover(run: str, operations: int) -> None:
            for number in range(operations):
                assert await queue.turn(run)
                done.append(run)
                if run == "idle" and number == 1:
                    queue.want("late")
                await asyncio.sleep(0)
            queue.leave(run)

        await asyncio.gather(recover("idle", 4), recover("other", 2), recover("late", 3))
        assert done == [*["idle"] * 2, *["late"] * 3, *["idle"] * 2, *["other"] * 2]

    in_loop(test)


def test_run_that_made_progress_goes_behind_one_that_waits() -> None:
    async def test() -> None:
        queue, done = RecoveryQueue(), list[str]()
        for run in ("first", "busy", "stuck"):
            queue.want(run)
        queue.renew("busy")
        queue.renew("idle")

        async def recover(run: str) -> None:
            assert await queue.turn(run)
            done.append(run)
            queue.leave(run)

        assert await queue.turn("first")
        others = [asyncio.create_task(recover(run)) for run in ("idle", "busy", "stuck")]
        await asyncio.sleep(0)
        queue.leave("first")
        await asyncio.gather(*others)
        assert done == ["stuck", "busy", "idle"]

    in_loop(test)


def test_a_run_that_waits_for_its_turn_ends_when_the_service_stops() -> None:
    async def test() -> None:
        queue = RecoveryQueue()
        assert await queue.turn("first")
        waiting = asyncio.create_task(queue.turn("second"))
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.close()
        assert await waiting is False

    in_loop(test)
