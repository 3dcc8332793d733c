"""The vault: whole or absent, verified, shared by content."""

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
)

RUN = "s:train:0"


def save(vault: Vault, name: str, content: bytes, *, overwrite: bool = False, **fields: Any) -> Any:
    with vault.pinned():
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


def test_what_was_saved_is_read(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", b"hello")
    again = Vault(tmp_path / "vault")
    assert again.manifest("training", RUN, "x") == manifest
    assert bytes(again.read(manifest, "a.safetensors")) == b"hello"
    assert list(again.manifests(RUN)) == [manifest]


def test_a_taken_name_is_refused_and_overwrite_replaces_it(vault: Vault) -> None:
    save(vault, "x", b"old")
    with pytest.raises(CheckpointExists):
        save(vault, "x", b"new")
    assert bytes(vault.read(vault.manifest("training", RUN, "x"), "a.safetensors")) == b"old"
    save(vault, "x", b"new", overwrite=True)
    assert bytes(vault.read(vault.manifest("training", RUN, "x"), "a.safetensors")) == b"new"


def test_the_same_content_is_stored_once(vault: Vault, tmp_path: Path) -> None:
    save(vault, "x", b"same")
    save(vault, "x", b"same", kind="sampler")
    assert len([p for p in (tmp_path / "vault/blobs").rglob("*") if p.is_file()]) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "delete"])
@pytest.mark.parametrize("kind", ["blobs", "manifests"])
def test_damage_is_found_and_named(vault: Vault, tmp_path: Path, damage: str, kind: str) -> None:
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
        save(vault, "y", b"content of a checkpoint")  # the same bytes heal the file
        assert vault.read(manifest, "a.safetensors")


def test_only_what_no_checkpoint_names_is_collected(vault: Vault) -> None:
    save(vault, "x", b"one")
    save(vault, "y", b"two")
    assert vault.collect(0) == []
    vault.delete("training", RUN, "x")
    assert [ref.size for ref in vault.collect(0)] == [3]
    assert bytes(vault.read(vault.manifest("training", RUN, "y"), "a.safetensors")) == b"two"
    with vault.pinned():
        vault.put([b"not committed yet"])
        assert vault.collect(0) == []


@pytest.mark.parametrize("part", ["..", "a/b", "", ".x", "a\x00", "%2e%2e/", "x" * 200])
def test_no_unchecked_name_reaches_the_file_system(vault: Vault, part: str) -> None:
    for kind, run, name in ((part, RUN, "x"), ("training", part, "x"), ("training", RUN, part)):
        with pytest.raises(UnsafeName):
            vault.manifest(kind, run, name)


def test_data_is_synced_before_its_name_appears_and_the_name_after(
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
