"""Snapshots in the course of a replay: a worker that is killed again and again still converges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everstep.engine import Model
from everstep.runtime.execution import snapshots
from everstep.runtime.execution.run import Run
from everstep.runtime.workers import supervisor
from tests.runtime.local import Local
from tests.runtime.test_snapshots import newest
from tests.waiting import eventually

STEPS = 8
REPLAYED = ("pass", "optim_step")
UNBOUNDED = 1000.0


def killed_before_a_snapshot(home: Path, pico: Model) -> tuple[Local, str, list[object]]:
    """A service that was killed, with operations of a second each to replay.

    Returns:
        The next service on its home, the run, and what its operations gave.
    """
    with Local(home, pico, replay_seconds=UNBOUNDED).killed() as service:
        service.seconds = 1.0
        run = service.new_run()
        seen = service.train(run, *range(STEPS))
    assert newest(home, run) == 0
    following = service.after(replay_seconds=UNBOUNDED, worker_attempts=100)
    following.seconds = 1.0
    return following, run, seen


class Killer:
    """Ends each worker after as many operations, once the snapshot that it began is durable.

    Args:
        service: whose worker.
        run: the run that is replayed.
        operations: how many each worker executes.
        most: how many workers are ended.
    """

    def __init__(self, service: Local, run: str, operations: int, most: int) -> None:
        self._service = service
        self._run = run
        self._operations = operations
        self._most = most
        self._base = 0
        self._saves = 0
        self.begun_from: list[int] = []
        """The position of the newest snapshot as each worker ended."""
        service.may_advance = self.may_advance

    def may_advance(self, kind: str, _: str) -> bool:
        kinds = [each for each, _ in self._service.finished]
        done = sum(each in REPLAYED for each in kinds)
        if kind in ("create", "restore"):
            self._base, self._saves = done, kinds.count("save")
        elif kind == "save":
            self._saves += 1
        elif done - self._base >= self._operations and len(self.begun_from) < self._most:
            if kinds.count("save") < self._saves:
                return False
            self.begun_from.append(newest(self._service.home, self._run))
            raise RuntimeError("this worker is killed")
        return True


@pytest.mark.parametrize("operations", [2, 7])
def test_replay_longer_than_the_time_between_kills_converges(
    home: Path, tmp_path: Path, pico: Model, operations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_SECONDS", 0.0)  # every worker is replaced at once
    with Local(tmp_path / "uninterrupted", pico) as other:
        expected = other.train(other.new_run(), *range(STEPS + 1))
    service, run, seen = killed_before_a_snapshot(home, pico)
    with service:
        killer = Killer(service, run, operations, most=2 * STEPS)
        assert seen + service.train(run, STEPS) == expected
    ends = killer.begun_from
    assert 1 < len(ends) < 2 * STEPS
    replaying = [position for position in ends if position < 2 * STEPS - 1]
    assert replaying == sorted(set(replaying)), "each worker began where the last one got to"


def saves(service: Local) -> int:
    """How many saves the worker has replied to."""
    return [kind for kind, _ in service.finished].count("save")


def test_undisturbed_replay_takes_few_snapshots(home: Path, pico: Model) -> None:
    service, run, _ = killed_before_a_snapshot(home, pico)
    with service:
        service.train(run, STEPS)
        eventually("a snapshot", lambda: saves(service) > 0)  # it is written in the background
        taken = saves(service)
    assert 1 <= taken <= 4, "after 1, 2, 4 and 8 seconds at the most"


def test_replay_in_another_environment_takes_no_snapshot_before_its_end(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, run, _ = killed_before_a_snapshot(home, pico)
    monkeypatch.setattr(Run, "environment", lambda *_: {"threads": 99})
    with service:
        service.do(run, "optim_step", adam_params={})
        taken = [kind for kind, _ in service.finished].count("save")
        assert (taken, newest(home, run)) == (1, 2 * STEPS)


def test_short_replay_takes_no_snapshot(home: Path, pico: Model) -> None:
    service, run, _ = killed_before_a_snapshot(home, pico)
    service.seconds = 0.01
    with service:
        service.train(run, STEPS)
        assert "save" not in [kind for kind, _ in service.finished]


def test_state_that_is_not_the_recorded_one_never_becomes_a_snapshot(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, run, _ = killed_before_a_snapshot(home, pico)
    right = 8  # operations, of which the last is a step of the optimizer
    original = snapshots.take_in_background

    async def take(run: Run, position: int, **options: bool) -> None:
        """Wait for the files, so that it doesn't depend on the disk which snapshots are taken."""
        await original(run, position, **options)
        await run.wait_for_writes()

    monkeypatch.setattr(snapshots, "take_in_background", take)

    def may_advance(kind: str, _: str) -> bool:
        """Make the weights wrong that the last step made, before anything can read them."""
        done = sum(each in REPLAYED for each, _ in service.finished)
        if done == right and kind in ("pass", "save"):
            state = service.commands._runs[run][1]
            state.arena.buffers["params"].add_(torch.tensor(1.0))
        return True

    service.may_advance = may_advance
    with service:
        failed = service.do(run, "optim_step", adam_params={})
        assert f"replayed operation {right + 1}" in failed["error"]
    assert newest(home, run) == 5, "after 1, 3 and 5 seconds; the next one is due after 9"
