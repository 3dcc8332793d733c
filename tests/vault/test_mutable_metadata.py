"""Mutable metadata: changes of a checkpoint after its save, stored beside its manifest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from everstep.vault import Manifest, Vault, gc, self_hashed_json
from everstep.vault.integrity import quarantine_damaged
from everstep.vault.storage.keys import metadata_key
from everstep.vault.verify import verify
from tests.vault.checkpoints import save

SOON = datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path)


def lifetime(vault: Vault, manifest: Manifest) -> tuple[datetime | None, bool]:
    changed = vault.with_metadata(manifest)
    rest = {"expires_at": manifest.expires_at, "public": manifest.public}
    assert changed.model_copy(update=rest) == manifest, "other fields changed"
    return changed.expires_at, changed.public


def file_of(vault: Vault, root: Path, manifest: Manifest) -> Path:
    return root / metadata_key(*manifest.id)


def test_last_metadata_applies_and_the_manifest_is_unchanged(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"})
    assert vault.with_metadata(manifest) is manifest
    for expires_at, public in ((SOON, False), (SOON, True), (None, True), (None, False)):
        vault.set_metadata(manifest, expires_at=expires_at, public=public)
        assert lifetime(Vault(tmp_path, writer=False), manifest) == (expires_at, public)
    assert vault.manifest(*manifest.id) == manifest
    assert verify(vault, everything=True).ok


def test_tags_replace_the_saved_user_metadata(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"}).model_copy(update={"user_metadata": {"a": "1"}})
    vault.commit(manifest, overwrite=True)
    for tags, expected in ((None, {"a": "1"}), ({"b": "2"}, {"b": "2"}), ({}, {})):
        vault.set_metadata(manifest, expires_at=None, public=False, user_metadata=tags)
        assert Vault(tmp_path, writer=False).with_metadata(manifest).user_metadata == expected
    assert vault.manifest(*manifest.id) == manifest
    assert verify(vault, everything=True).ok


def test_metadata_without_tags_keeps_the_saved_ones(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"}).model_copy(update={"user_metadata": {"a": "1"}})
    vault.commit(manifest, overwrite=True)
    vault.set_metadata(manifest, expires_at=SOON, public=True)
    path = file_of(vault, tmp_path, manifest)
    content = self_hashed_json.decode(path.read_bytes(), "marks")
    del content["user_metadata"]  # the format of earlier releases
    path.write_bytes(self_hashed_json.encode(content))
    changed = vault.with_metadata(manifest)
    assert (changed.user_metadata, changed.expires_at, changed.public) == ({"a": "1"}, SOON, True)


def test_metadata_belongs_to_one_manifest(vault: Vault) -> None:
    old = save(vault, "x", {"a": b"content"})
    other = save(vault, "x", {"a": b"content"}, kind="sampler")
    vault.set_metadata(old, expires_at=SOON, public=True)
    assert lifetime(vault, other) == (None, False)
    new = old.model_copy(update={"created_at": old.created_at + timedelta(microseconds=1)})
    vault.commit(new, overwrite=True)
    assert lifetime(vault, new) == (None, False), "the metadata belongs to the previous save"
    assert lifetime(vault, old) == (SOON, True)


def test_metadata_is_deleted_with_its_checkpoint(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"})
    vault.set_metadata(manifest, expires_at=SOON, public=True)
    kept = file_of(vault, tmp_path, manifest).read_bytes()
    assert vault.delete(*manifest.id)
    assert not file_of(vault, tmp_path, manifest).exists()
    assert not vault.delete(*manifest.id)
    file_of(vault, tmp_path, manifest).write_bytes(
        kept
    )  # as after a deletion that a crash interrupted
    gc.unreferenced(vault, 0)
    assert file_of(vault, tmp_path, manifest).exists()
    gc.collect(vault, 0)
    assert not file_of(vault, tmp_path, manifest).exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "empty"])
def test_damaged_metadata_is_detected_and_loses_and_publishes_nothing(
    vault: Vault, tmp_path: Path, damage: str
) -> None:
    manifest = save(vault, "x", {"a": b"content"}).model_copy(update={"expires_at": SOON})
    vault.commit(manifest, overwrite=True)
    other = save(vault, "y", {"a": b"content"})
    vault.set_metadata(manifest, expires_at=SOON, public=True)
    vault.set_metadata(other, expires_at=SOON, public=True)
    path = file_of(vault, tmp_path, manifest)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {
            "flip": bytes(content),
            "cut": bytes(content[:-3]),
            "swap": file_of(vault, tmp_path, other).read_bytes(),
            "empty": b"",
        }[damage]
    )
    assert lifetime(vault, manifest) == (None, False), "not kept and private"
    report = verify(vault)
    assert [(each.key, each.checkpoints) for each in report.damaged] == [
        (metadata_key(*manifest.id), (manifest.id,))
    ]
    assert quarantine_damaged(vault, metadata_key(*manifest.id)) is not None
    assert verify(vault).ok
    assert lifetime(vault, manifest) == (None, False), "not kept and private after the quarantine"
    assert vault.manifest(*manifest.id) == manifest, "the checkpoint does not load"
    gc.collect(vault, 0)
    vault.set_metadata(manifest, expires_at=SOON, public=True)
    assert lifetime(vault, manifest) == (SOON, True), "not repaired by new metadata"
