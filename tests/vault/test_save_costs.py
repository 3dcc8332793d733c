"""Costs of a save that no clock shows: fsyncs, rounds of fsyncs, and bytes written and hashed."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import blake3 as blake3_module
import pytest

from everstep.background_io import is_background, lower_priority
from everstep.vault import Vault
from everstep.vault.storage import hashed as hashed_module
from everstep.vault.storage import local
from everstep.vault.storage.keys import BLOBS
from tests.vault.checkpoints import draft, load, save_at_once

MIB = 1 << 20
FILES = {"adapter": b"a" * (3 * MIB + 5), "config": b"{}", "optimizer": b"o" * (9 * MIB + 1)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count fsyncs, and the bytes that are written."""
    counted: Counter[str] = Counter()

    def watch(name: str, amount: Callable[..., int]) -> None:
        real = getattr(os, name)

        def call(handle: int, *arguments: Any) -> Any:
            result = real(handle, *arguments)
            counted[name] += amount(result)
            return result

        monkeypatch.setattr(os, name, call)

    watch("fsync", lambda _: 1)
    watch("write", lambda count: count)
    return counted


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """Return a vault in which every directory is known to be durable, as after some saves."""
    vault = Vault(tmp_path)
    save_at_once(vault, "first", FILES)
    prefixes = (f"{BLOBS}{number:02x}" for number in range(256))
    vault.storage.make(*(vault.storage.path(each) for each in prefixes))  # type: ignore[attr-defined]
    return vault


def test_save_fsyncs_each_file_and_directory_once(vault: Vault, calls: Counter[str]) -> None:
    for step in itertools.count():
        contents = {**FILES, "adapter": b"%d" % step}
        calls.clear()
        manifest = save_at_once(vault, f"x{step}", contents)
        directories = {ref.blake3[:2] for ref in manifest.files.values()}
        assert calls["fsync"] == len(FILES) + 1 + len(directories) + 1
        if len(directories) == len(FILES):
            return


def test_save_writes_each_byte_once(vault: Vault, calls: Counter[str]) -> None:
    manifest = save_at_once(vault, "x", FILES)
    journal_and_manifest = calls["write"] - sum(map(len, FILES.values()))
    assert 0 < journal_and_manifest < 2000
    assert load(vault, manifest) == FILES


def test_save_hashes_each_byte_once_and_large_chunks_beside_the_writing(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[tuple[str, int]] = []

    class Counting:
        def __init__(self) -> None:
            self._real = blake3_module.blake3()

        def update(self, data: memoryview) -> None:
            hashed.append((threading.current_thread().name, len(data)))
            self._real.update(data)

        def hexdigest(self) -> str:
            return self._real.hexdigest()

    monkeypatch.setattr(hashed_module, "blake3", Counting)
    save_at_once(vault, "x", FILES)
    assert sum(size for _, size in hashed) == sum(map(len, FILES.values()))
    elsewhere = {name.split("_")[0] for name, size in hashed if size >= MIB}
    assert elsewhere == {"hash"}


def test_first_use_of_directories_costs_no_further_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault(tmp_path)
    rounds: list[int] = []
    alone: list[Path] = []
    at_once = local._at_once

    def counting(syncs: Sequence[Callable[[], None]]) -> None:
        rounds.append(len(syncs))
        at_once(syncs)

    monkeypatch.setattr(local, "_at_once", counting)
    monkeypatch.setattr(local, "sync_directory", alone.append)
    manifest = save_at_once(vault, "x", FILES)
    blobs = {vault.storage.path(BLOBS + ref.blake3[:2]) for ref in manifest.files.values()}  # type: ignore[attr-defined]
    above = {each for blob in blobs for each in blob.parents if each.is_relative_to(tmp_path)}
    assert blobs | above <= set(alone)
    assert len(alone) == len(set(alone)) == sum(rounds[1:])
    assert len(rounds) == 3, "files; their directories and all above; the manifest's directory"


def hash_policies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the scheduling policy of the thread that hashes each chunk."""
    policies: list[int] = []

    class Recording:
        def __init__(self) -> None:
            self._real = blake3_module.blake3()
            self.hexdigest = self._real.hexdigest

        def update(self, data: memoryview) -> None:
            policies.append(os.sched_getscheduler(0))
            self._real.update(data)

    monkeypatch.setattr(hashed_module, "blake3", Recording)
    return policies


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies")
@pytest.mark.parametrize("patience", [3600.0, -1.0])
def test_background_save_hashes_on_idle_processors_unless_it_waits_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    policies = hash_policies(monkeypatch)
    monkeypatch.setattr(hashed_module, "PATIENCE_SECONDS", patience)
    vault = Vault(tmp_path)
    content = {"a": [bytes([number]) * MIB for number in range(4)]}

    def save() -> None:
        lower_priority()
        assert is_background()
        vault.save(content, lambda files: draft("x", files))

    with ThreadPoolExecutor(1) as background:
        background.submit(save).result()
    then = os.SCHED_IDLE if patience > 0 else os.SCHED_OTHER
    assert policies == [os.SCHED_IDLE, then, then, then]


@pytest.mark.skipif(sys.platform != "linux", reason="scheduling policies")
def test_save_that_somebody_waits_for_is_hashed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = hash_policies(monkeypatch)
    save_at_once(Vault(tmp_path), "x", FILES)
    assert not is_background()
    assert set(policies) == {os.SCHED_OTHER}
