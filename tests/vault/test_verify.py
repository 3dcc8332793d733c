"""Verification: finds every damaged file and its checkpoints, also beside a running service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everstep.vault import CheckpointId, Vault, gc
from everstep.vault.integrity import quarantine_damaged
from everstep.vault.storage.keys import blob_key, manifest_key
from everstep.vault.verify import Report, verify
from tests.vault.checkpoints import RUN, save
from tests.vault.disk import Disk
from tests.vault.homes import rot

FILES = {"a": b"content of a" * 9, "b": b"content of b" * 9}
X, Y = CheckpointId("training", RUN, "x"), CheckpointId("sampler", "other:train:1", "y")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    vault = Vault(tmp_path / "vault")
    save(vault, "x", FILES)
    save(vault, "y", {"a": FILES["a"]}, kind="sampler", run="other:train:1")
    save(vault, "s", {"c": b"snapshot"}, kind="snapshot")
    return vault


def a_key(vault: Vault) -> str:
    return blob_key(vault.read_manifest(*X).files["a"].blake3)


def found(report: Report) -> list[tuple[str, tuple[CheckpointId, ...]]]:
    return [(each.key, each.checkpoints) for each in report.damaged]


def test_intact_vault_is_read_once_and_not_changed(vault: Vault, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    with Disk(tmp_path) as disk:
        disk.home = tmp_path / "vault"
        report = verify(vault, everything=True, progress=lambda *both: progress.append(both))
        assert disk.steps == 0
    assert report.ok
    assert (report.checkpoints, report.files, report.size) == (3, 3, 9 * 24 + 8)
    assert progress[-1] == (report.size, report.size)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "directory"])
def test_damaged_file_is_reported_with_all_its_checkpoints(
    vault: Vault, tmp_path: Path, damage: str
) -> None:
    key = a_key(vault)
    path = tmp_path / "vault" / key
    content = path.read_bytes()
    if damage == "flip":
        rot(path)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    report = verify(vault)
    assert found(report) == [(key, (Y, X))]
    assert report.damaged[0].runs == ("other:train:1", RUN)
    path.rmdir() if damage == "directory" else None
    path.write_bytes(content)
    assert verify(vault).ok


def test_damaged_manifest_is_reported_and_hides_no_other(vault: Vault, tmp_path: Path) -> None:
    key = manifest_key(*X)
    rot(tmp_path / "vault" / key)
    (tmp_path / "vault" / "manifests" / "stray").write_bytes(b"")
    report = verify(vault)
    assert found(report) == [("manifests/stray", ()), (key, (X,))]
    assert report.checkpoints == 2


def test_unreferenced_files_are_verified_on_request(vault: Vault, tmp_path: Path) -> None:
    key = blob_key(vault.put([b"of no checkpoint"]).blake3)
    rot(tmp_path / "vault" / key)
    assert verify(vault).ok
    assert found(verify(vault, everything=True)) == [(key, ())]


def test_quarantined_files_are_reported_separately(vault: Vault, tmp_path: Path) -> None:
    key = a_key(vault)
    rot(tmp_path / "vault" / key)
    quarantine_damaged(vault, key)
    report = verify(vault)
    assert report.ok
    assert [record.key for record in report.quarantined] == [key]


class InterruptedStorage:
    """A storage that calls a function before a file is read."""

    def __init__(self, storage: Any, key: str, act: Callable[[], object]) -> None:
        self._storage, self._key, self._act = storage, key, act

    def chunks(self, key: str, **options: Any) -> Any:
        if key == self._key:
            self._key = ""
            self._act()
        return self._storage.chunks(key, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def test_checkpoint_deleted_during_the_verification_is_not_damage(
    vault: Vault, tmp_path: Path
) -> None:
    key = blob_key(vault.read_manifest(*X).files["b"].blake3)
    service = Vault(tmp_path / "vault")

    def delete() -> None:
        service.delete(*X)
        gc.collect(service, 0)

    vault.storage = InterruptedStorage(vault.storage, key, delete)
    assert verify(vault).ok
    assert not (tmp_path / "vault" / key).exists()


def test_file_repaired_during_the_verification_is_not_damage(vault: Vault, tmp_path: Path) -> None:
    key = a_key(vault)
    rot(tmp_path / "vault" / key)
    service = Vault(tmp_path / "vault")
    real = vault.storage

    class Repaired(InterruptedStorage):
        def chunks(self, key: str, **options: Any) -> Any:
            content = [bytes(chunk) for chunk in real.chunks(key)]
            if key == self._key:
                self._act()
            return iter([memoryview(chunk) for chunk in content])

    vault.storage = Repaired(real, key, lambda: service.put([FILES["a"]]))
    assert verify(vault).ok
