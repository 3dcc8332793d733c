"""Quarantine: what is damaged is moved away with a note, never loaded, and healed by its bytes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from pathlib import Path

import pytest

from everstep.runtime.saving import read_checkpoint
from everstep.vault import (
    CheckpointDamaged,
    CheckpointNotFound,
    CheckpointQuarantined,
    FormatTooNew,
    Manifest,
    Vault,
)
from everstep.vault.inspection import put_away
from everstep.vault.keys import blob_key, manifest_key
from everstep.vault.local import sync_directory, write_synced
from tests.vault.checkpoints import RUN, load, save
from tests.vault.disk import Dead, Death, Disk
from tests.vault.homes import rot

FILES = {"adapter_model.safetensors": b"adapter" * 9, "optimizer.safetensors": b"moments" * 9}
SHARED = {"adapter_model.safetensors": FILES["adapter_model.safetensors"]}
SOURCE = {"kind": "training", "run": RUN, "name": "x"}


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


def test_a_damaged_file_is_moved_with_a_note_of_whom_it_touches(
    vault: Vault, tmp_path: Path
) -> None:
    key = damage(vault, tmp_path)
    damaged = (tmp_path / "vault" / key).read_bytes()
    note = put_away(vault, key)
    assert note is not None
    assert not (tmp_path / "vault" / key).exists()
    assert (tmp_path / "vault" / "quarantine" / "content" / key).read_bytes() == damaged
    told = json.loads((tmp_path / "vault" / "quarantine" / "notes" / f"{key}.json").read_bytes())
    assert told["key"] == key
    assert told["reason"].startswith("its bytes hash to")
    assert told["runs"] == ["other:train:1", RUN]
    assert told["checkpoints"] == [["sampler", "other:train:1", "y"], ["training", RUN, "x"]]
    assert list(vault.quarantine.standing()) == [note]


def test_what_needs_a_quarantined_file_is_not_listed_nor_loaded_and_the_rest_is(
    vault: Vault, tmp_path: Path
) -> None:
    held = vault.manifest("training", RUN, "x")
    key = damage(vault, tmp_path)
    put_away(vault, key)
    assert names(vault) == {"z"}
    for ask in (
        lambda: vault.manifest("training", RUN, "x"),
        lambda: vault.read(held, "adapter_model.safetensors"),
    ):
        with pytest.raises(CheckpointQuarantined, match=rf"x is quarantined: .*{key}"):
            ask()
    assert bytes(vault.read(held, "optimizer.safetensors")) == FILES["optimizer.safetensors"]


def test_the_same_bytes_heal_every_checkpoint_that_needs_them(vault: Vault, tmp_path: Path) -> None:
    put_away(vault, damage(vault, tmp_path))
    save(vault, "again", SHARED)
    assert names(vault) == {"x", "y", "z", "again"}
    assert load(vault, vault.manifest("training", RUN, "x")) == FILES
    assert list(vault.quarantine.standing()) == []


def test_a_sound_file_is_never_moved(vault: Vault) -> None:
    assert put_away(vault, key_of(vault)) is None
    assert put_away(vault, manifest_key("training", RUN, "x")) is None
    assert names(vault) == {"x", "y", "z"}


def test_a_missing_file_is_noted_where_it_is_missed(vault: Vault, tmp_path: Path) -> None:
    key = key_of(vault)
    (tmp_path / "vault" / key).unlink()
    note = put_away(vault, key)
    assert note is not None and note.reason == "it is missing"
    with pytest.raises(CheckpointQuarantined, match="it is missing"):
        vault.manifest("training", RUN, "x")
    assert put_away(vault, blob_key("0" * 64)) is None


def test_a_damaged_manifest_is_moved_and_its_files_are_kept(vault: Vault, tmp_path: Path) -> None:
    key = manifest_key("training", RUN, "x")
    manifest = vault.manifest("training", RUN, "x")
    path = tmp_path / "vault" / key
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 7'))
    assert put_away(vault, key) is not None
    with pytest.raises(CheckpointQuarantined, match="its manifest"):
        vault.manifest("training", RUN, "x")
    assert names(vault) == {"y", "z"}
    assert vault.collect(0) == []
    vault.commit(manifest)  # the same bytes again
    assert load(vault, vault.manifest("training", RUN, "x")) == FILES


def test_a_manifest_of_a_newer_release_is_left_alone(vault: Vault, tmp_path: Path) -> None:
    newer = vault.manifest("training", RUN, "z").model_copy(update={"format_version": 2})
    key = manifest_key("training", RUN, "z")
    (tmp_path / "vault" / key).write_bytes(newer.encode())
    with pytest.raises(FormatTooNew):
        vault.manifest("training", RUN, "z")
    assert put_away(vault, key) is None
    assert (tmp_path / "vault" / key).exists()


def test_a_load_quarantines_what_it_finds_damaged(vault: Vault, tmp_path: Path) -> None:
    key = damage(vault, tmp_path)
    with pytest.raises(CheckpointDamaged, match="hashes to"):
        read_checkpoint(vault, SOURCE, optimizer=True)
    assert not (tmp_path / "vault" / key).exists()
    with pytest.raises(CheckpointQuarantined):
        read_checkpoint(vault, SOURCE, optimizer=True)


def test_a_load_of_what_is_sound_quarantines_nothing(vault: Vault, tmp_path: Path) -> None:
    manifest, files = read_checkpoint(vault, SOURCE, optimizer=False)
    assert isinstance(manifest, Manifest) and list(files) == ["adapter_model.safetensors"]
    assert not (tmp_path / "vault" / "quarantine").exists()


def test_nothing_is_moved_while_someone_writes(vault: Vault, tmp_path: Path) -> None:
    key = damage(vault, tmp_path)
    with vault.pinned():
        assert put_away(vault, key) is None
        assert put_away(Vault(tmp_path / "vault", writer=False), key) is None
    assert put_away(vault, key) is not None


def _hold(root: Path, entered: object, leave: object) -> None:
    with Vault(root, writer=False).held():
        entered.set()  # type: ignore[attr-defined]
        leave.wait(60)  # type: ignore[attr-defined]


def test_nothing_is_collected_while_another_process_holds_it(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    vault.put([b"x"])
    spawn = multiprocessing.get_context("fork")
    entered, leave = spawn.Event(), spawn.Event()
    process = spawn.Process(target=_hold, args=(tmp_path, entered, leave))
    process.start()
    assert entered.wait(60)
    assert vault.is_held
    assert vault.collect(0) == []
    leave.set()
    process.join(60)
    assert not vault.is_held
    assert len(vault.collect(0)) == 1


def test_a_deleted_checkpoint_is_gone_from_quarantine_as_well(vault: Vault, tmp_path: Path) -> None:
    key = manifest_key("training", RUN, "x")
    rot(tmp_path / "vault" / key)
    put_away(vault, key)
    assert vault.delete("training", RUN, "x")
    with pytest.raises(CheckpointNotFound):
        vault.manifest("training", RUN, "x")
    assert not vault.delete("training", RUN, "x")


def test_collection_forgets_quarantined_files_that_no_one_names(
    vault: Vault, tmp_path: Path
) -> None:
    key = damage(vault, tmp_path)
    put_away(vault, key)
    content = tmp_path / "vault" / "quarantine" / "content" / key
    vault.collect(0)
    assert content.exists()
    vault.delete("training", RUN, "x")
    vault.delete("sampler", "other:train:1", "y")
    vault.collect(3600)
    assert content.exists()
    vault.collect(0)
    assert not content.exists()
    assert list(vault.quarantine.standing()) == []


@pytest.mark.parametrize("death", ["kill", "power cut", "error"])
def test_a_quarantine_that_dies_anywhere_loses_no_bytes(tmp_path: Path, death: Death) -> None:
    for after in range(40):
        with Disk(tmp_path) as disk:
            vault = Vault(disk.home / "vault")
            manifest = save(vault, "x", FILES)
            key = blob_key(manifest.files["adapter_model.safetensors"].blake3)
            path = disk.home / "vault" / key
            path.unlink()
            write_synced(path, [b"damaged"])
            sync_directory(path.parent)
            disk.fall(after, death)
            done = False
            with contextlib.suppress(Dead, OSError):
                done = put_away(vault, key) is not None
            finished = disk.steps <= after
            disk.restart(death)
            vault = Vault(disk.home / "vault")
            moved = disk.home / "vault" / "quarantine" / "content" / key
            there = [p for p in (disk.home / "vault" / key, moved) if p.exists()]
            assert {p.read_bytes() for p in there} == {b"damaged"}
            assert not done or there == [moved]
            with pytest.raises(CheckpointDamaged):
                load(vault, vault.manifest("training", RUN, "x"))
            assert done or put_away(vault, key) is not None or there == [moved]
            save(vault, "again", FILES)
            assert load(vault, vault.manifest("training", RUN, "x")) == FILES
        if finished:
            return
    raise AssertionError("it never came to an end")
