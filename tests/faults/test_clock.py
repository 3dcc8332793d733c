"""The wall clock jumps, by days and in both directions, while the service runs and between starts.

Intervals are of the monotonic clock, and order is that of sequence ids: a clock that is wrong, and
then set right, costs nothing but what a date was asked for.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import everstep
from everstep.testing.invariants import draft
from everstep.vault import CheckpointId, Vault
from everstep.vault.backup import BackupDirectory
from everstep.vault.retention import Policy, to_delete
from tests.conftest import Service
from tests.faults.keeper import Keeper
from tests.faults.test_failpoints import check_all_listed_load
from tests.scenario import MODEL, connect, data

LIBRARY = next(Path("/usr").glob("lib*/**/faketime/libfaketimeMT.so.1"), None)
HOURS = (30, -50, 24 * 40, -1, 7, -24 * 400)
ROUNDS = 4


class Clock:
    """What processes think the time is: the true one and some hours."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)

    def jump(self, hours: int) -> None:
        """Have it be so many hours ahead, all at once."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{hours:+d}h")
        fresh.replace(self._file)

    def environment(self, _start: int) -> dict[str, str]:
        """Has a process go by this clock."""
        return {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@contextmanager
def jumping(clock: Clock) -> Iterator[None]:
    """Jumps all the while."""
    done = threading.Event()

    def jump() -> None:
        chance = random.Random(5)
        while not done.wait(0.2):
            clock.jump(chance.choice(HOURS))

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def trained(run: Any, number: int) -> list[Any]:
    """Steps, a save, a step more, back to the save, and the step again."""
    params = everstep.types.AdamParams(learning_rate=0.01)
    seen = []
    for step in range(3):
        passed = run.forward_backward(data(everstep, 2, number * 3 + step), "cross_entropy")
        run.optim_step(params).result()
        seen.append(passed.result().metrics["loss:sum"])
    path = run.save_state(f"s{number}").result().path
    for _ in range(2):
        passed = run.forward_backward(data(everstep, 2, number), "cross_entropy")
        run.optim_step(params).result()
        seen.append(passed.result().metrics["loss:sum"])
        run.load_state_with_optimizer(path).result()
    assert seen[-1] == seen[-2]
    return seen


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(LIBRARY is None, reason="there is no libfaketime")
def test_jumps_change_no_number_and_lose_nothing(tmp_path: Path, service: Service) -> None:
    clock = Clock(tmp_path / "clock")
    settings = (
        "replay_seconds=0.1",
        "idle_seconds=0.5",
        "collect_interval_seconds=0.2",
        "scrub_interval_seconds=0.5",
    )
    with Keeper(tmp_path / "home", *settings, environment=clock.environment) as keeper:
        keeper.wait_ready()
        client = connect(everstep, keeper.url)
        run = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        seen = []
        with jumping(clock):
            for number in range(ROUNDS):
                seen.append(trained(run, number))
                if number in (0, 2):
                    keeper.kill()  # what starts again is in another year
        saved = client.create_rest_client().list_checkpoints(run.model_id).result().checkpoints
        assert len(saved) == ROUNDS
        paths = [each.tinker_path for each in saved]
        check_all_listed_load(keeper.home, paths, external=False)
        client.close("success").result()
    twin = connect(everstep, service.url)
    other = twin.create_lora_training_client(MODEL, rank=4, seed=3).result()
    assert seen == [trained(other, number) for number in range(ROUNDS)]
    twin.close("success").result()


def test_the_collector_is_not_fooled_by_old_looking_files(tmp_path: Path) -> None:
    """After a jump everything looks older than any grace period; what is needed stays."""
    vault = Vault(tmp_path / "vault")
    checkpoint = CheckpointId("training", "s:train:0", "a")
    with vault.pinned():
        files = {"adapter": vault.put([b"being saved"])}
        for path in (tmp_path / "vault").rglob("*"):
            os.utime(path, (0, 0))
        vault.collect(0)
        vault.commit(draft(checkpoint, files, step=1), overwrite=False)
    for path in (tmp_path / "vault").rglob("*"):
        os.utime(path, (0, 0))
    vault.collect(0)
    assert bytes(vault.read(vault.manifest(*checkpoint), "adapter")) == b"being saved"


def test_the_last_of_a_run_is_told_by_its_position() -> None:
    """A save that was made while the clock was behind is the newest all the same."""
    made = datetime(2026, 1, 1, tzinfo=UTC)
    manifests = [
        draft(CheckpointId("training", "s:train:0", name), {}, step=step).model_copy(
            update={"created_at": made + timedelta(days=days)}
        )
        for step, (name, days) in enumerate([("first", 9), ("second", 10), ("third", 0)])
    ]
    gone = to_delete(manifests, Policy(keep_last=1), now=made, good=lambda _: True)
    assert {each.name for each in gone} == {"first", "second"}


def test_the_newest_backup_is_the_one_that_was_made_last(tmp_path: Path) -> None:
    place = BackupDirectory(tmp_path)
    now = datetime(2026, 6, 1, tzinfo=UTC)
    first = place.next_id(now)
    place.of(first).mkdir()
    second = place.next_id(now - timedelta(days=90))
    assert second > first
    place.of(second).mkdir()
    assert place.next_id(now + timedelta(days=1)) == "20260602T000000.000000Z"
    place.close()
