"""Marks: what was changed of a checkpoint since it was saved, beside its manifest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from everstep.vault import Manifest, Vault, sealed
from everstep.vault.inspection import put_away
from everstep.vault.keys import marks_key
from everstep.vault.verify import verify
from tests.vault.checkpoints import save

SOON = datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path)


def lifetime(vault: Vault, manifest: Manifest) -> tuple[datetime | None, bool]:
    marked = vault.marked(manifest)
    rest = {"expires_at": manifest.expires_at, "public": manifest.public}
    assert marked.model_copy(update=rest) == manifest, "nothing else is changed"
    return marked.expires_at, marked.public


def file_of(vault: Vault, root: Path, manifest: Manifest) -> Path:
    return root / marks_key(*manifest.id)


def test_the_last_marks_count_and_the_manifest_stays(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"})
    assert vault.marked(manifest) is manifest
    for expires_at, public in ((SOON, False), (SOON, True), (None, True), (None, False)):
        vault.mark(manifest, expires_at=expires_at, public=public)
        assert lifetime(Vault(tmp_path, writer=False), manifest) == (expires_at, public)
    assert vault.manifest(*manifest.id) == manifest
    assert verify(vault, everything=True).ok


def test_tags_stand_in_the_place_of_what_was_saved(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"}).model_copy(update={"user_metadata": {"a": "1"}})
    vault.commit(manifest, overwrite=True)
    for tags, told in ((None, {"a": "1"}), ({"b": "2"}, {"b": "2"}), ({}, {})):
        vault.mark(manifest, expires_at=None, public=False, user_metadata=tags)
        assert Vault(tmp_path, writer=False).marked(manifest).user_metadata == told
    assert vault.manifest(*manifest.id) == manifest
    assert verify(vault, everything=True).ok


def test_marks_that_know_of_no_tags_change_none(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"}).model_copy(update={"user_metadata": {"a": "1"}})
    vault.commit(manifest, overwrite=True)
    vault.mark(manifest, expires_at=SOON, public=True)
    path = file_of(vault, tmp_path, manifest)
    content = sealed.decode(path.read_bytes(), "marks")
    del content["user_metadata"]  # as they were written before there were tags
    path.write_bytes(sealed.encode(content))
    marked = vault.marked(manifest)
    assert (marked.user_metadata, marked.expires_at, marked.public) == ({"a": "1"}, SOON, True)


def test_marks_belong_to_one_manifest(vault: Vault) -> None:
    old = save(vault, "x", {"a": b"content"})
    other = save(vault, "x", {"a": b"content"}, kind="sampler")
    vault.mark(old, expires_at=SOON, public=True)
    assert lifetime(vault, other) == (None, False)
    new = old.model_copy(update={"created_at": old.created_at + timedelta(microseconds=1)})
    vault.commit(new, overwrite=True)
    assert lifetime(vault, new) == (None, False), "it was saved after these marks"
    assert lifetime(vault, old) == (SOON, True)


def test_marks_go_with_their_checkpoint(vault: Vault, tmp_path: Path) -> None:
    manifest = save(vault, "x", {"a": b"content"})
    vault.mark(manifest, expires_at=SOON, public=True)
    kept = file_of(vault, tmp_path, manifest).read_bytes()
    assert vault.delete(*manifest.id)
    assert not file_of(vault, tmp_path, manifest).exists()
    assert not vault.delete(*manifest.id)
    file_of(vault, tmp_path, manifest).write_bytes(kept)  # of a deletion that a crash broke off
    vault.collect(0, dry_run=True)
    assert file_of(vault, tmp_path, manifest).exists()
    vault.collect(0)
    assert not file_of(vault, tmp_path, manifest).exists()


@pytest.mark.parametrize("harm", ["flip", "cut", "swap", "empty"])
def test_damaged_marks_are_found_and_never_lose_or_publish_anything(
    vault: Vault, tmp_path: Path, harm: str
) -> None:
    manifest = save(vault, "x", {"a": b"content"}).model_copy(update={"expires_at": SOON})
    vault.commit(manifest, overwrite=True)
    other = save(vault, "y", {"a": b"content"})
    vault.mark(manifest, expires_at=SOON, public=True)
    vault.mark(other, expires_at=SOON, public=True)
    path = file_of(vault, tmp_path, manifest)
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {
            "flip": bytes(content),
            "cut": bytes(content[:-3]),
            "swap": file_of(vault, tmp_path, other).read_bytes(),
            "empty": b"",
        }[harm]
    )
    assert lifetime(vault, manifest) == (None, False), "kept, and private"
    report = verify(vault)
    assert [(each.key, each.checkpoints) for each in report.damaged] == [
        (marks_key(*manifest.id), (manifest.id,))
    ]
    assert put_away(vault, marks_key(*manifest.id)) is not None
    assert verify(vault).ok
    assert lifetime(vault, manifest) == (None, False), "also when they are out of the way"
    assert vault.manifest(*manifest.id) == manifest, "the checkpoint loads"
    vault.collect(0)
    vault.mark(manifest, expires_at=SOON, public=True)
    assert lifetime(vault, manifest) == (SOON, True), "marked again, it is healed"
