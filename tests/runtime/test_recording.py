"""A run goes on while its last result is recorded; nobody is told of one that is not durable."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger import Ledger, NotWritten
from everstep.vault import Vault
from tests.runtime.local import Local, batch
from tests.waiting import eventually_async

BEFORE, SHIFTS = 0, (1, 2)
OPERATIONS_BEFORE = 2
ADAM = {"learning_rate": 0.01, "weight_decay": 0.1}


def undisturbed(home: Path, pico: Model) -> tuple[list[Any], dict[str, str]]:
    """Return what a run's steps give that nothing disturbs, and the hashes of its files."""
    with Local(home, pico) as local:
        run = local.new_run()
        results = local.train(run, BEFORE, *SHIFTS)[2:]
        return results, saved(local, run)


def saved(local: Local, run: str) -> dict[str, str]:
    """Save a run and return the hashes of its files."""
    local.do(run, "save_weights", path="end")
    manifest = Vault(local.home / "vault", writer=False).manifest("training", run, "end")
    return {name: file.blake3 for name, file in manifest.files.items()}


class Recordings:
    """Stands between a service and its ledger, and sees every result that is to be recorded.

    Args:
        before: awaited with the number of each, from 0. What it raises is raised instead.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], Any]) -> None:
        self.begun: list[str] = []
        self.durable: list[str] = []
        succeed = Ledger.succeed

        async def record(ledger: Ledger, request_id: str, *arguments: Any, **also: Any) -> Any:
            self.begun.append(request_id)
            await before(len(self.begun) - 1)
            operation = await succeed(ledger, request_id, *arguments, **also)
            self.durable.append(request_id)
            return operation

        monkeypatch.setattr(Ledger, "succeed", record)


def test_next_operation_executes_while_a_result_is_recorded(
    home: Path, tmp_path: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, files = undisturbed(tmp_path / "undisturbed", pico)
    may_record = threading.Event()

    async def hold(number: int) -> None:
        if number == 0:
            await eventually_async("the test lets it be recorded", may_record.is_set)

    with Local(home, pico, poll_seconds=0.01) as local:
        run = local.new_run()
        local.train(run, BEFORE)
        recordings = Recordings(monkeypatch, hold)
        executed = len(local.finished)
        with local.steps.shut():  # until all have arrived
            steps = [each for shift in SHIFTS for each in local.step(run, shift)]
        while len(local.finished) < executed + 3:
            assert local.poll(steps[0]).status_code == 408
        assert [kind for kind, _ in local.finished[executed:]] == ["pass", "optim_step", "pass"]
        states = [local.poll(each).status_code for each in steps]
        assert states == [408] * 4, "nobody is told of what is not durable"
        assert recordings.begun == steps[:1], "a result waits until the one before it is durable"
        may_record.set()
        assert [local.result(each) for each in steps] == expected
        assert recordings.durable == steps
        assert saved(local, run) == files


def test_operation_behind_a_result_that_is_not_recorded_is_executed_again_after_it(
    home: Path, tmp_path: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, files = undisturbed(tmp_path / "undisturbed", pico)

    async def fail_first(number: int) -> None:
        if number == 0:
            await eventually_async("the next two are executed", lambda: executed(local) >= 3)
            raise NotWritten("the disk is away for a moment")

    def executed(local: Local) -> int:
        return len(local.finished) - before

    with Local(home, pico) as local:
        run = local.new_run()
        local.train(run, BEFORE)
        recordings = Recordings(monkeypatch, fail_first)
        before = len(local.finished)
        with local.steps.shut():  # until all have arrived
            steps = [each for shift in SHIFTS for each in local.step(run, shift)]
        assert [local.result(each) for each in steps] == expected
        assert recordings.begun == [steps[0], *steps], "none before the one that failed"
        assert recordings.durable == steps
        assert saved(local, run) == files


def test_run_that_is_ahead_of_the_ledger_is_not_snapshotted(
    home: Path, tmp_path: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, files = undisturbed(tmp_path / "undisturbed", pico)

    async def fail_first(number: int) -> None:
        if number == 0:
            actor = local.app.state.runtime._scheduler.runs.find(run)
            await eventually_async("it waits for its next operation", lambda: actor.idle)
            evictions.append(asyncio.create_task(actor.unload()))
            await eventually_async("it is being evicted", actor._executing.locked)
            raise NotWritten("the disk is away for a moment")

    evictions: list[asyncio.Task[bool]] = []
    with Local(home, pico) as local:
        run = local.new_run()
        local.train(run, BEFORE)
        Recordings(monkeypatch, fail_first)
        first = local.do(run, "forward_backward", forward_backward_input=batch(SHIFTS[0]))
        assert evictions
        taken = [int(name) for _, name in Vault(home / "vault").names("snapshot", run)]
        assert max(taken, default=0) <= OPERATIONS_BEFORE
        second = local.do(run, "optim_step", adam_params=ADAM)
        assert [first, second, *local.train(run, *SHIFTS[1:])] == expected
        assert saved(local, run) == files
