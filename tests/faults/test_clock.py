"""The wall clock jumps by days in both directions, while the service runs and between starts.

Intervals use the monotonic clock and order follows sequence ids: a wrong clock affects only what a
user asked for by date.
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
from everstep.vault import CheckpointId, Vault, gc
from everstep.vault.backup import BackupDirectory
from everstep.vault.retention import Policy, to_delete
from tests.conftest import Service
from tests.faults.keeper import Keeper
from tests.faults.test_failpoints import check_all_listed_load
from tests.scenario import MODEL, connect, data

LIBRARY = next(Path("/usr").glob("lib*/**/faketime/libfaketimeMT.so.1"), None)
HOURS = (30, -50, 24 * 40, -1, 7, -24 * 400)
ROUNDS = 3


class Clock:
    """A clock for processes: the true time and an offset in hours."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)

    def jump(self, hours: int) -> None:
        """Set the offset in hours."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{hours:+d}h")
        new.replace(self._file)

    def environment(self, _start: int) -> dict[str, str]:
        """Return the environment of a process that uses this clock."""
        return {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@contextmanager
def jumping(clock: Clock) -> Iterator[None]:
    """Let the clock jump during the block."""
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
    """Train, save, train a step, load the save and train the same step."""
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


@pytest.mark.long(reason="several services, each under another clock")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed")
def test_clock_jumps_change_no_number_and_lose_nothing(tmp_path: Path, service: Service) -> None:
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
                if number == 0:
                    keeper.kill()  # the next start is in another year
        saved = client.create_rest_client().list_checkpoints(run.model_id).result().checkpoints
        assert len(saved) == ROUNDS
        paths = [each.tinker_path for each in saved]
        check_all_listed_load(keeper.home, paths, external=False)
        client.close("success").result()
    calm = connect(everstep, service.url)
    other = calm.create_lora_training_client(MODEL, rank=4, seed=3).result()
    assert seen == [trained(other, number) for number in range(ROUNDS)]
    calm.close("success").result()


def test_gc_keeps_pinned_files_that_look_old(tmp_path: Path) -> None:
    """After a jump everything looks older than any grace period; what is needed stays."""
    vault = Vault(tmp_path / "vault")
    checkpoint = CheckpointId("training", "s:train:0", "a")
    with vault.gc_paused():
        files = {"adapter": vault.put([b"being saved"])}
        for path in (tmp_path / "vault").rglob("*"):
            os.utime(path, (0, 0))
        gc.collect(vault, 0)
        vault.commit(draft(checkpoint, files, step=1), overwrite=False)
    for path in (tmp_path / "vault").rglob("*"):
        os.utime(path, (0, 0))
    gc.collect(vault, 0)
    assert bytes(vault.read(vault.manifest(*checkpoint), "adapter")) == b"being saved"


def test_retention_keeps_the_last_checkpoint_by_position() -> None:
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


def test_backup_ids_grow_although_the_clock_goes_back(tmp_path: Path) -> None:
    place = BackupDirectory(tmp_path)
    now = datetime(2026, 6, 1, tzinfo=UTC)
    first = place.next_id(now)
    place.of(first).mkdir()
    second = place.next_id(now - timedelta(days=90))
    assert second > first
    place.of(second).mkdir()
    assert place.next_id(now + timedelta(days=1)) == "20260602T000000.000000Z"
    place.close()
