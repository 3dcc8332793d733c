"""Verification: finds every damaged file, says whom it touches, and is not misled by a service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everstep.vault import CheckpointId, Vault
from everstep.vault.inspection import put_away
from everstep.vault.keys import blob_key, manifest_key
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
    return blob_key(vault.recorded(*X).files["a"].blake3)


def found(report: Report) -> list[tuple[str, tuple[CheckpointId, ...]]]:
    return [(each.key, each.checkpoints) for each in report.damaged]


def test_a_sound_vault_is_read_once_and_not_changed(vault: Vault, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with Disk(tmp_path) as disk:
        disk.home = tmp_path / "vault"
        report = verify(vault, everything=True, progress=lambda *both: told.append(both))
        assert disk.steps == 0
    assert report.ok
    assert (report.checkpoints, report.files, report.size) == (3, 3, 9 * 24 + 8)
    assert told[-1] == (report.size, report.size)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "directory"])
def test_a_damaged_file_is_told_with_all_it_touches(
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


def test_a_damaged_manifest_is_told_and_hides_no_other(vault: Vault, tmp_path: Path) -> None:
    key = manifest_key(*X)
    rot(tmp_path / "vault" / key)
    (tmp_path / "vault" / "manifests" / "stray").write_bytes(b"")
    report = verify(vault)
    assert found(report) == [("manifests/stray", ()), (key, (X,))]
    assert report.checkpoints == 2


def test_files_that_no_checkpoint_names_are_read_when_all_is_asked_for(
    vault: Vault, tmp_path: Path
) -> None:
    key = blob_key(vault.put([b"of no checkpoint"]).blake3)
    rot(tmp_path / "vault" / key)
    assert verify(vault).ok
    assert found(verify(vault, everything=True)) == [(key, ())]


def test_what_is_quarantined_is_told_apart(vault: Vault, tmp_path: Path) -> None:
    key = a_key(vault)
    rot(tmp_path / "vault" / key)
    put_away(vault, key)
    report = verify(vault)
    assert report.ok
    assert [note.key for note in report.quarantined] == [key]


class Meanwhile:
    """A storage in which someone acts before a file is read."""

    def __init__(self, storage: Any, key: str, act: Callable[[], object]) -> None:
        self._storage, self._key, self._act = storage, key, act

    def chunks(self, key: str, **options: Any) -> Any:
        if key == self._key:
            self._key = ""
            self._act()
        return self._storage.chunks(key, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def test_a_checkpoint_that_is_deleted_and_collected_meanwhile_is_no_damage(
    vault: Vault, tmp_path: Path
) -> None:
    key = blob_key(vault.recorded(*X).files["b"].blake3)
    service = Vault(tmp_path / "vault")

    def delete() -> None:
        service.delete(*X)
        service.collect(0)

    vault._storage = Meanwhile(vault.storage, key, delete)  # type: ignore[assignment]
    assert verify(vault).ok
    assert not (tmp_path / "vault" / key).exists()


def test_a_file_that_is_healed_meanwhile_is_no_damage(vault: Vault, tmp_path: Path) -> None:
    key = a_key(vault)
    rot(tmp_path / "vault" / key)
    service = Vault(tmp_path / "vault")
    real = vault.storage

    class Healed(Meanwhile):
        def chunks(self, key: str, **options: Any) -> Any:
            content = [bytes(chunk) for chunk in real.chunks(key)]
            if key == self._key:
                self._act()
            return iter([memoryview(chunk) for chunk in content])

    vault._storage = Healed(  # type: ignore[assignment]
        real, key, lambda: service.put([FILES["a"]])
    )
    assert verify(vault).ok
