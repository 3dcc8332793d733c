"""Costs of saves and loads through the service that no clock shows: fsyncs, commits, bytes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.ledger.sqlite.commit_counter import CommitCounter
from everstep.runtime.execution import snapshots
from everstep.vault import Vault
from everstep.vault.storage.keys import BLOBS
from tests.runtime.local import Local

FILES = 3
"""Adapter, its configuration, optimizer."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the vault's fsyncs and the bytes it writes, and the ledger's commits.

    Older snapshots are kept: their deletion goes on behind the reply, with a commit of its own.
    """
    monkeypatch.setattr(snapshots, "_prune_in_background", lambda *_: None)
    found: Counter[str] = Counter()
    fsync, write, commit = os.fsync, os.write, CommitCounter.mark_durable

    def counting_fsync(handle: int) -> None:
        if "/vault" in os.readlink(f"/proc/self/fd/{handle}"):  # noqa: PTH115
            found["fsyncs"] += 1
        fsync(handle)

    def counting_write(handle: int, data: Any) -> int:
        if "/vault/tmp/" in os.readlink(f"/proc/self/fd/{handle}"):  # noqa: PTH115
            found["bytes"] += memoryview(data).nbytes
        return write(handle, data)

    def counting_commit(self: CommitCounter) -> None:
        found["commits"] += 1
        commit(self)

    monkeypatch.setattr(os, "fsync", counting_fsync)
    monkeypatch.setattr(os, "write", counting_write)
    monkeypatch.setattr(CommitCounter, "mark_durable", counting_commit)
    return found


def with_known_directories(service: Local) -> str:
    """A run of which a checkpoint and a snapshot are saved, in a vault that has all directories."""
    for number in range(256):
        (service.home / "vault" / BLOBS / f"{number:02x}").mkdir(parents=True, exist_ok=True)
    run = service.new_run()
    service.train(run, 0)
    path = service.do(run, "save_weights", path="first")["path"]
    service.do(run, "load_weights", path=path, optimizer=True)
    return run


def test_save_costs_two_commits_and_an_fsync_for_each_file_and_directory(
    home: Path, pico: Model, counted: Counter[str]
) -> None:
    with Local(home, pico).killed() as service:
        run = with_known_directories(service)
        service.train(run, 1)
        counted.clear()
        service.do(run, "save_weights", path="x")
        cost = dict(counted)  # a vault that is opened to look syncs its own directory
        assert cost["commits"] == 2, "accepted, recorded"
        manifest = Vault(home / "vault", writer=False).manifest("training", run, "x")
        assert len(manifest.files) == FILES
        directories = len({ref.blake3[:2] for ref in manifest.files.values()})
        blobs = 1  # where a directory is used for the first time in this process
        assert cost["fsyncs"] <= FILES + 1 + blobs + directories + 1
        assert manifest.size < cost["bytes"] < manifest.size + 4096


@pytest.mark.parametrize("optimizer", [True, False])
def test_load_writes_a_manifest_and_nothing_else(
    home: Path, pico: Model, counted: Counter[str], optimizer: bool
) -> None:
    with Local(home, pico).killed() as service:
        run = with_known_directories(service)
        path = service.do(run, "save_weights", path="x")["path"]
        service.train(run, 1)
        counted.clear()
        service.do(run, "load_weights", path=path, optimizer=optimizer)
        config = 0 if optimizer else 2  # adapter_config.json, which is not read, and its directory
        assert counted["fsyncs"] == 2 + config
        assert 0 < counted["bytes"] < 4096
        assert counted["commits"] == 2, "accepted, recorded"
