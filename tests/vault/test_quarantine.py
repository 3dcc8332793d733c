"""Quarantine: damaged files are moved away with a record, never loaded, repaired by a save."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from pathlib import Path

import pytest

from everstep.durable_files import sync_directory, write_new
from everstep.vault import (
    CheckpointDamaged,
    CheckpointId,
    CheckpointNotFound,
    CheckpointQuarantined,
    FormatTooNew,
    Manifest,
    Vault,
    gc,
)
from everstep.vault.integrity import quarantine_damaged
from everstep.vault.storage.keys import blob_key, manifest_key
from everstep.worker.checkpoint_io import read_checkpoint
from tests.vault.checkpoints import RUN, load, save
from tests.vault.disk import Dead, Death, Disk
from tests.vault.homes import rot

FILES = {"adapter_model.safetensors": b"adapter" * 9, "optimizer.safetensors": b"moments" * 9}
SHARED = {"adapter_model.safetensors": FILES["adapter_model.safetensors"]}
SOURCE = CheckpointId("training", RUN, "x")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    vault = Vault(tmp_path / "vault")
    save(vault, "x", FILES)
    save(vault, "y", SHARED, kind="sampler", run="other:train:1")
    save(vault, "z", {"a": b"healthy"})
    return vault


def key_of(vault: Vault, file: str = "adapter_model.safetensors") -> str:
    return blob_key(vault.manifest("training", RUN, "x").files[file].blake3)


def damage(vault: Vault, tmp_path: Path) -> str:
    key = key_of(vault)
    rot(tmp_path / "vault" / key)
    return key


def names(vault: Vault) -> set[str]:
    return {manifest.name for manifest in vault.manifests()}


def test_damaged_file_is_moved_with_a_record_of_its_checkpoints(
    vault: Vault, tmp_path: Path
) -> None:
    key = damage(vault, tmp_path)
    damaged = (tmp_path / "vault" / key).read_bytes()
    record = quarantine_damaged(vault, key)
    assert record is not None
    assert not (tmp_path / "vault" / key).exists()
    assert (tmp_path / "vault" / "quarantine" / "content" / key).read_bytes() == damaged
    stored = json.loads((tmp_path / "vault" / "quarantine" / "notes" / f"{key}.json").read_bytes())
    assert stored["key"] == key
    assert stored["reason"].startswith("its bytes hash to")
    assert stored["runs"] == ["other:train:1", RUN]
    assert stored["checkpoints"] == [["sampler", "other:train:1", "y"], ["training", RUN, "x"]]
    assert list(vault.quarantine.records()) == [record]


def test_checkpoints_that_need_a_quarantined_file_are_neither_listed_nor_loaded(
    vault: Vault, tmp_path: Path
) -> None:
    held = vault.manifest("training", RUN, "x")
    key = damage(vault, tmp_path)
    quarantine_damaged(vault, key)
    assert names(vault) == {"z"}
    for access in (
        lambda: vault.manifest("training", RUN, "x"),
        lambda: vault.read(held, "adapter_model.safetensors"),
    ):
        with pytest.raises(CheckpointQuarantined, match=rf"x is quarantined: .*{key}"):
            access()
    assert bytes(vault.read(held, "optimizer.safetensors")) == FILES["optimizer.safetensors"]


def test_save_of_the_same_bytes_repairs_every_checkpoint_that_needs_them(
    vault: Vault, tmp_path: Path
) -> None:
    quarantine_damaged(vault, damage(vault, tmp_path))
    save(vault, "again", SHARED)
    assert names(vault) == {"x", "y", "z", "again"}
    assert load(vault, vault.manifest("training", RUN, "x")) == FILES
    assert list(vault.quarantine.records()) == []


def test_intact_file_is_never_moved(vault: Vault) -> None:
    assert quarantine_damaged(vault, key_of(vault)) is None
    assert quarantine_damaged(vault, manifest_key("training", RUN, "x")) is None
    assert names(vault) == {"x", "y", "z"}


def test_missing_file_is_recorded_if_a_checkpoint_needs_it(vault: Vault, tmp_path: Path) -> None:
    key = key_of(vault)
    (tmp_path / "vault" / key).unlink()
    record = quarantine_damaged(vault, key)
    assert record is not None and record.reason == "it is missing"
    with pytest.raises(CheckpointQuarantined, match="it is missing"):
        vault.manifest("training", RUN, "x")
    assert quarantine_damaged(vault, blob_key("0" * 64)) is None


def test_damaged_manifest_is_moved_and_its_files_are_kept(vault: Vault, tmp_path: Path) -> None:
    key = manifest_key("training", RUN, "x")
    manifest = vault.manifest("training", RUN, "x")
    path = tmp_path / "vault" / key
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 7'))
    assert quarantine_damaged(vault, key) is not None
    with pytest.raises(CheckpointQuarantined, match="its manifest"):
        vault.manifest("training", RUN, "x")
    assert names(vault) == {"y", "z"}
    assert gc.collect(vault, 0) == []
    vault.commit(manifest)  # writes the same bytes
    assert load(vault, vault.manifest("training", RUN, "x")) == FILES


def test_manifest_of_a_newer_release_is_not_moved(vault: Vault, tmp_path: Path) -> None:
    newer = vault.manifest("training", RUN, "z").model_copy(update={"format_version": 3})
    key = manifest_key("training", RUN, "z")
    (tmp_path / "vault" / key).write_bytes(newer.encode())
    with pytest.raises(FormatTooNew):
        vault.manifest("training", RUN, "z")
    assert quarantine_damaged(vault, key) is None
    assert (tmp_path / "vault" / key).exists()


def test_load_quarantines_a_damaged_file(vault: Vault, tmp_path: Path) -> None:
    key = damage(vault, tmp_path)
    with pytest.raises(CheckpointDamaged, match="hashes to"):
        read_checkpoint(vault, SOURCE, optimizer=True)
    assert not (tmp_path / "vault" / key).exists()
    with pytest.raises(CheckpointQuarantined):
        read_checkpoint(vault, SOURCE, optimizer=True)


def test_load_of_an_intact_checkpoint_quarantines_nothing(vault: Vault, tmp_path: Path) -> None:
    manifest, files = read_checkpoint(vault, SOURCE, optimizer=False)
    assert isinstance(manifest, Manifest) and list(files) == ["adapter_model.safetensors"]
    assert not (tmp_path / "vault" / "quarantine").exists()


def test_no_file_is_moved_during_a_write(vault: Vault, tmp_path: Path) -> None:
    key = damage(vault, tmp_path)
    with vault.writing():
        assert quarantine_damaged(vault, key) is None
        assert quarantine_damaged(Vault(tmp_path / "vault", writer=False), key) is None
    assert quarantine_damaged(vault, key) is not None


def _hold(root: Path, entered: object, leave: object) -> None:
    with Vault(root, writer=False).gc_paused():
        entered.set()  # type: ignore[attr-defined]
        leave.wait(60)  # type: ignore[attr-defined]


def test_no_file_is_collected_while_another_process_pauses_gc(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.put([b"x"])
    spawn = multiprocessing.get_context("fork")
    entered, leave = spawn.Event(), spawn.Event()
    process = spawn.Process(target=_hold, args=(tmp_path, entered, leave))
    process.start()
    assert entered.wait(60)
    assert vault.is_gc_paused
    assert gc.collect(vault, 0) == []
    leave.set()
    process.join(60)
    assert not vault.is_gc_paused
    assert len(gc.collect(vault, 0)) == 1


def test_deletion_removes_a_quarantined_checkpoint(vault: Vault, tmp_path: Path) -> None:
    key = manifest_key("training", RUN, "x")
    rot(tmp_path / "vault" / key)
    quarantine_damaged(vault, key)
    assert vault.delete("training", RUN, "x")
    with pytest.raises(CheckpointNotFound):
        vault.manifest("training", RUN, "x")
    assert not vault.delete("training", RUN, "x")


def test_collection_removes_unreferenced_files_from_quarantine(
    vault: Vault, tmp_path: Path
) -> None:
    key = damage(vault, tmp_path)
    quarantine_damaged(vault, key)
    content = tmp_path / "vault" / "quarantine" / "content" / key
    gc.collect(vault, 0)
    assert content.exists()
    vault.delete("training", RUN, "x")
    vault.delete("sampler", "other:train:1", "y")
    gc.collect(vault, 3600)
    assert content.exists()
    gc.collect(vault, 0)
    assert not content.exists()
    assert list(vault.quarantine.records()) == []


@pytest.mark.parametrize("death", ["kill", "power cut", "error"])
def test_quarantine_that_dies_at_any_call_loses_no_bytes(tmp_path: Path, death: Death) -> None:
    for after in range(40):
        with Disk(tmp_path) as disk:
            vault = Vault(disk.home / "vault")
            manifest = save(vault, "x", FILES)
            key = blob_key(manifest.files["adapter_model.safetensors"].blake3)
            path = disk.home / "vault" / key
            path.unlink()
            write_new(path, [b"damaged"])
            sync_directory(path.parent)
            disk.fail_after(after, death)
            done = False
            with contextlib.suppress(Dead, OSError):
                done = quarantine_damaged(vault, key) is not None
            finished = disk.steps <= after
            disk.restart(death)
            vault = Vault(disk.home / "vault")
            moved = disk.home / "vault" / "quarantine" / "content" / key
            there = [p for p in (disk.home / "vault" / key, moved) if p.exists()]
            assert {p.read_bytes() for p in there} == {b"damaged"}
            assert not done or there == [moved]
            with pytest.raises(CheckpointDamaged):
                load(vault, vault.manifest("training", RUN, "x"))
            assert done or quarantine_damaged(vault, key) is not None or there == [moved]
            save(vault, "again", FILES)
            assert load(vault, vault.manifest("training", RUN, "x")) == FILES
        if finished:
            assert after > 3
            return
    raise AssertionError("the quarantine made more calls than the loop covers")
