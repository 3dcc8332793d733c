"""Vault: saves, verified reads, deduplication, collection and the order of its fsyncs."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from everstep.vault import (
    CheckpointDamaged,
    CheckpointExists,
    CheckpointNotFound,
    Manifest,
    UnsafeName,
    Vault,
    gc,
)

RUN = "s:train:0"


def save(vault: Vault, name: str, content: bytes, *, overwrite: bool = False, **fields: Any) -> Any:
    with vault.gc_paused():
        manifest = Manifest(
            **{
                "kind": "training",
                "run_id": RUN,
                "name": name,
                "created_at": datetime.now(UTC),
                "base_model": "m",
                "base_fingerprint": "f",
                "lora": {"rank": 1},
                "optimizer": None,
                "step": 1,
                "position": 1,
                "files": {"a.safetensors": vault.put([content])},
                **fields,
            }
        )
        vault.commit(manifest, overwrite=overwrite)
    return manifest


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault")


def test_read_returns_the_saved_checkpoint(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", b"hello")
    again = Vault(tmp_path / "vault")
    assert again.manifest("training", RUN, "x") == manifest
    assert bytes(again.read(manifest, "a.safetensors")) == b"hello"
    assert list(again.manifests(RUN)) == [manifest]


@pytest.mark.parametrize("diverged", [False, True])
def test_manifest_names_divergence_only_where_there_is_one(vault: Vault, diverged: bool) -> None:
    """Releases that don't know the field read the others as before."""
    manifest = save(vault, "x", b"hello", diverged=diverged)
    assert (b'"diverged"' in manifest.encode()) == diverged
    assert vault.manifest("training", RUN, "x") == manifest


def test_existing_name_is_rejected_and_overwrite_replaces_it(vault: Vault) -> None:
    save(vault, "x", b"old")
    with pytest.raises(CheckpointExists):
        save(vault, "x", b"new")
    assert bytes(vault.read(vault.manifest("training", RUN, "x"), "a.safetensors")) == b"old"
    save(vault, "x", b"new", overwrite=True)
    assert bytes(vault.read(vault.manifest("training", RUN, "x"), "a.safetensors")) == b"new"


def test_equal_content_is_stored_once(vault: Vault, tmp_path: Path) -> None:
    save(vault, "x", b"same")
    save(vault, "x", b"same", kind="sampler")
    assert len([p for p in (tmp_path / "vault/blobs").rglob("*") if p.is_file()]) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "delete"])
@pytest.mark.parametrize("kind", ["blobs", "manifests"])
def test_damage_is_detected_and_named(vault: Vault, tmp_path: Path, damage: str, kind: str) -> None:
    manifest = save(vault, "x", b"content of a checkpoint")
    (path,) = [p for p in (tmp_path / "vault" / kind).rglob("*") if p.is_file()]
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        if damage == "flip":
            content[len(content) // 2] ^= 1
        path.write_bytes(
            content[:-1]
            if damage == "cut"
            else bytes(len(content))
            if damage == "zero"
            else content
        )
    expected = (
        CheckpointNotFound if (damage, kind) == ("delete", "manifests") else CheckpointDamaged
    )
    with pytest.raises(expected, match="x"):
        vault.read(vault.manifest("training", RUN, "x"), "a.safetensors")
    if kind == "blobs":
        save(vault, "y", b"content of a checkpoint")  # the same bytes repair the file
        assert vault.read(manifest, "a.safetensors")


def test_only_unreferenced_files_are_collected(vault: Vault) -> None:
    save(vault, "x", b"one")
    save(vault, "y", b"two")
    assert gc.collect(vault, 0) == []
    vault.delete("training", RUN, "x")
    assert [ref.size for ref in gc.collect(vault, 0)] == [3]
    assert bytes(vault.read(vault.manifest("training", RUN, "y"), "a.safetensors")) == b"two"
    with vault.gc_paused():
        vault.put([b"not committed yet"])
        assert gc.collect(vault, 0) == []


@pytest.mark.parametrize("part", ["..", "a/b", "", ".x", "a\x00", "%2e%2e/", "x" * 200])
def test_unsafe_name_is_rejected(vault: Vault, part: str) -> None:
    for kind, run, name in ((part, RUN, "x"), ("training", part, "x"), ("training", RUN, part)):
        with pytest.raises(UnsafeName):
            vault.manifest(kind, run, name)


def test_save_syncs_data_then_names_it_then_syncs_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault(tmp_path / "vault")
    save(vault, "before", b"makes the directories")
    calls: list[str] = []
    sync, rename, link = os.fsync, Path.replace, os.link

    def synced(handle: int) -> None:
        target = Path(f"/proc/self/fd/{handle}").readlink()
        calls.append("sync directory" if target.is_dir() else "sync file")
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        calls.append("name")
        return rename(self, target)

    def linked(source: Path, target: Path) -> None:
        calls.append("name")
        link(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(os, "link", linked)
    save(vault, "x", b"makes the directories")
    once = ["sync file", "name", "sync directory"]
    assert calls == once + once
