"""A run's next command lies in the worker while one executes; nothing else follows from that."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger import Ledger, NotWritten
from everstep.ledger.payload_log import contents
from tests.runtime.local import Local, batch
from tests.runtime.test_recording import saved
from tests.runtime.test_snapshots import newest, snapshots
from tests.waiting import eventually, eventually_async

STEPS = 4
BAD = {"learning_rate": 1e38}


def queued(local: Local, run: str, steps: int = STEPS, first: int = 0) -> list[str]:
    """Submit steps while nothing is executed."""
    return [each for shift in range(first, first + steps) for each in local.step(run, shift)]


def awaited(home: Path, pico: Model, steps: int = STEPS) -> tuple[list[Any], dict[str, str]]:
    """Return what steps give that are sent one operation at a time, and the hashes of the files."""
    with Local(home, pico) as local:
        run = local.new_run()
        results = []
        for shift in range(steps):
            results.append(local.do(run, "forward_backward", forward_backward_input=batch(shift)))
            adam = {"learning_rate": 0.01, "weight_decay": 0.1}
            results.append(local.do(run, "optim_step", adam_params=adam))
        return results, saved(local, run)


@contextmanager
def held(local: Local) -> Iterator[None]:
    """Execute nothing in the block, and begin when a command and the one behind it are sent."""
    before = len(local.received)
    with local.steps.shut():
        yield
        eventually("the next one is sent", lambda: len(local.received) >= before + 2)


def test_worker_finds_its_next_command_when_it_has_finished_one(home: Path, pico: Model) -> None:
    with Local(home, pico) as local:
        run = local.new_run()
        before, ahead = len(local.received), []

        def may_advance(kind: str, _: str) -> bool:
            finished, received = len(local.finished), len(local.received)
            left = 2 * STEPS - (finished - before)
            if kind in ("pass", "optim_step") and received - finished < min(2, left):
                return False
            ahead.append(received - finished)
            return True

        local.may_advance = may_advance
        with local.steps.shut():
            steps = queued(local, run)
        results = [local.result(each) for each in steps]
    assert not any("error" in each for each in results)
    assert max(ahead) == 2, "no more than one is ahead"


def test_command_that_arrives_while_one_executes_is_sent_at_once(home: Path, pico: Model) -> None:
    with Local(home, pico) as local:
        run = local.new_run()
        before = len(local.received)
        with local.steps.shut():
            local.send(run, "forward_backward", forward_backward_input=batch())
            eventually("the pass is sent", lambda: len(local.received) == before + 1)
            local.send(run, "optim_step", adam_params={})
            eventually("the step is sent", lambda: len(local.received) == before + 2)


def test_large_pass_is_not_sent_ahead(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "LOGGED_BYTES", 10)
    with Local(home, pico, poll_seconds=0.1) as local:
        run = local.new_run()
        before = len(local.received)
        with local.steps.shut():
            passes = [
                local.send(run, "forward_backward", forward_backward_input=batch(shift))
                for shift in range(2)
            ]
            assert local.poll(passes[0]).status_code == 408
            assert len(local.received) == before + 1
        assert not any("error" in local.result(each) for each in passes)


def test_failure_changes_nothing_for_the_command_behind_it(home: Path, pico: Model) -> None:
    with Local(home, pico) as local:
        run, other = local.new_run(), local.new_run()
        with held(local):
            steps = [local.send(run, "forward_backward", forward_backward_input=batch())]
            steps.append(local.send(run, "optim_step", adam_params=BAD))
            steps += queued(local, run, first=1)
        ahead = [local.result(each) for each in steps]
        alone = [local.do(other, "forward_backward", forward_backward_input=batch())]
        alone.append(local.do(other, "optim_step", adam_params=BAD))
        assert "would make the run diverge" in ahead[1]["error"]
        assert [*ahead[:1], *ahead[2:]] == alone[:1] + local.train(other, *range(1, 1 + STEPS))
        assert saved(local, run) == saved(local, other)


def test_snapshot_that_is_due_stands_for_what_is_ahead_as_well(
    home: Path, tmp_path: Path, pico: Model
) -> None:
    expected, files = awaited(tmp_path / "awaited", pico)
    with Local(home, pico, replay_seconds=1.5).killed() as local:
        local.seconds = 1.0
        run = local.new_run()
        with held(local):
            steps = queued(local, run)
        results = [local.result(each) for each in steps]
        eventually("it is snapshotted", lambda: newest(home, run) > 0)
        assert snapshots(home, run)[0].position == 3, "one late, and no more"
    with local.after() as later:
        assert results == expected
        assert saved(later, run) == files


def test_snapshot_that_is_wanted_does_not_wait_for_the_queue(
    home: Path, tmp_path: Path, pico: Model
) -> None:
    expected, files = awaited(tmp_path / "awaited", pico)
    with Local(home, pico) as local:
        run = local.new_run()
        assert local.http.portal is not None
        with held(local):
            steps = queued(local, run)
            runs = local.app.state.runtime._scheduler.runs
            durable = local.http.portal.start_task_soon(runs.make_durable, run)
        assert durable.result(60)
        assert snapshots(home, run)[0].position <= 2
        assert [local.result(each) for each in steps] == expected
        assert saved(local, run) == files


def test_run_with_a_command_ahead_is_not_evicted(home: Path, tmp_path: Path, pico: Model) -> None:
    expected, files = awaited(tmp_path / "awaited", pico)
    with Local(home, pico) as local:
        run = local.new_run()
        assert local.http.portal is not None
        actor = local.app.state.runtime._scheduler.runs.find(run)
        with held(local):
            steps = queued(local, run)
            evicted = local.http.portal.start_task_soon(actor.unload)
        assert not evicted.result(60)
        assert [local.result(each) for each in steps] == expected
        assert saved(local, run) == files


def test_stop_waits_for_the_command_that_is_ahead_and_snapshots_it(
    home: Path, tmp_path: Path, pico: Model
) -> None:
    expected, files = awaited(tmp_path / "awaited", pico)
    with Local(home, pico) as local:
        run = local.new_run()
        with held(local):
            steps = queued(local, run)
            stopping = threading.Thread(target=local.__exit__, args=(None, None, None))
            actor = local.app.state.runtime._scheduler.runs.find(run)
            stopping.start()
            eventually("it stops", actor._stopping.is_set)
        stopping.join(60)
    assert newest(home, run) == 2
    with local.after() as later:
        assert [later.result(each) for each in steps] == expected
        assert saved(later, run) == files


def test_stop_takes_no_snapshot_of_a_state_that_is_ahead(
    home: Path, tmp_path: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, files = awaited(tmp_path / "awaited", pico)
    succeed = Ledger.succeed

    async def record(ledger: Ledger, request_id: str, *arguments: Any, **also: Any) -> Any:
        if request_id == save:
            await actor._stopping.wait()
            raise NotWritten("the disk is away for a moment")
        return await succeed(ledger, request_id, *arguments, **also)

    with Local(home, pico) as local:
        run = local.new_run()
        actor = local.app.state.runtime._scheduler.runs.find(run)
        monkeypatch.setattr(Ledger, "succeed", record)
        with local.steps.shut():
            save = local.send(run, "save_weights", path="first")
            steps = queued(local, run)
            local.may_advance = lambda kind, _: kind == "save" or actor._run.save_lost
        eventually("the next one is sent", lambda: local.received[-1][0] == "optim_step")
        stopping = threading.Thread(target=local.__exit__, args=(None, None, None))
        stopping.start()
        stopping.join(60)
    assert snapshots(home, run) == []
    monkeypatch.undo()
    with local.after() as later:
        assert [later.result(each) for each in steps] == expected
        assert saved(later, run) == files


@pytest.mark.parametrize("victim", ["pass", "optim_step"])
def test_end_of_the_worker_is_blamed_on_the_command_that_executed(
    home: Path, pico: Model, victim: str
) -> None:
    with Local(home, pico, worker_attempts=2) as local:
        run = local.new_run()
        ends: list[str] = []

        def may_advance(kind: str, _: str) -> bool:
            if kind == victim and len(ends) < 2:
                ends.append(kind)
                local.lose_worker(signal.SIGSEGV)
                raise RuntimeError("this ends the worker")
            return True

        local.may_advance = may_advance
        with held(local):
            steps = local.step(run)
        results = dict(zip(["pass", "optim_step"], map(local.result, steps), strict=True))
        assert "The worker ended 2 times" in results.pop(victim)["error"]
        assert not any("error" in each for each in results.values())
        assert ends == [victim] * 2


@pytest.mark.parametrize("recorded", [True, False])
def test_operation_that_ended_the_worker_ahead_of_its_turn_is_given_up(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Whether or not what comes before it is recorded: if not, that is executed again."""
    succeed, ends, held_back = Ledger.succeed, list[int](), list[str]()

    async def record(ledger: Ledger, request_id: str, *arguments: Any, **also: Any) -> Any:
        held_back.append(request_id)
        if len(held_back) == (1 if recorded else 2):
            await eventually_async("the worker ended", lambda: bool(ends) and not local.pool.ready)
            if not recorded:
                raise NotWritten("the disk is away for a moment")
        return await succeed(ledger, request_id, *arguments, **also)

    with Local(home, pico, worker_attempts=1) as local:
        run = local.new_run()
        begun = {local.commands: len(local.finished)}

        def may_advance(kind: str, _: str) -> bool:
            """End each worker in its second pass."""
            first = begun.setdefault(local.commands, len(local.finished))
            if kind == "pass" and ("pass", run) in local.finished[first:]:
                ends.append(len(local.finished))
                local.lose_worker(signal.SIGSEGV)
                raise RuntimeError("this ends the worker")
            return True

        monkeypatch.setattr(Ledger, "succeed", record)
        local.may_advance = may_advance
        with held(local):
            steps = queued(local, run, 2)
        results = [local.result(each) for each in steps]
        assert "The worker ended 1 times" in results.pop(2)["error"]
        assert not any("error" in each for each in results)
        assert len(ends) == 1


def test_worker_killed_at_each_command_changes_no_number(
    home: Path, tmp_path: Path, pico: Model
) -> None:
    expected, files = awaited(tmp_path / "awaited", pico)
    with Local(home, pico) as local:
        run = local.new_run()
        killed: set[int] = set()

        def may_advance(kind: str, _: str) -> bool:
            finished = len([each for each in local.finished if each[0] in ("pass", "optim_step")])
            if kind in ("pass", "optim_step") and finished not in killed and len(killed) < 4:
                killed.add(finished)
                local.lose_worker()
                raise RuntimeError("it was killed")
            return True

        local.may_advance = may_advance
        with held(local):
            steps = queued(local, run)
        assert [local.result(each) for each in steps] == expected
        assert saved(local, run) == files
        assert len(killed) == 4


def test_service_killed_with_a_command_ahead_changes_no_number(
    home: Path, tmp_path: Path, pico: Model
) -> None:
    expected, files = awaited(tmp_path / "awaited", pico)
    local = Local(home, pico)
    with local.killed():
        run = local.new_run()
        with held(local):
            steps = queued(local, run)
        local.result(steps[1])
    with local.after() as later:
        assert [later.result(each) for each in steps] == expected
        assert saved(later, run) == files
