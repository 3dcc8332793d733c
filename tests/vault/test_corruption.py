"""Corruption: every changed byte is detected, named in the error and never served."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.vault import CheckpointDamaged, CheckpointNotFound, Manifest, Vault, VaultError, gc
from everstep.vault.export import export
from tests.vault.checkpoints import RUN, load, save

FILES = {"adapter.safetensors": b"adapter" * 5, "optimizer.safetensors": b"moments" * 7}
OTHER = {"adapter.safetensors": b"ADAPTER" * 5, "optimizer.safetensors": b"MOMENTS" * 7}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    vault = Vault(tmp_path / "vault")
    save(vault, "x", FILES)
    save(vault, "y", OTHER)
    return tmp_path / "vault"


def blob(root: Path, name: str, file: str) -> Path:
    digest = Vault(root).manifest("training", RUN, name).files[file].blake3
    return root / "blobs" / digest[:2] / digest


def manifest_file(root: Path, name: str) -> Path:
    return root / "manifests" / "training" / RUN / f"{name}.json"


def served(root: Path) -> dict[str, bytes]:
    vault = Vault(root)
    return load(vault, vault.manifest("training", RUN, "x"))


def every_bit(content: bytes) -> list[bytes]:
    """Return the content once for each of its bits, with that bit flipped."""
    number = int.from_bytes(content, "big")
    return [(number ^ (1 << bit)).to_bytes(len(content), "big") for bit in range(8 * len(content))]


def test_flip_of_any_bit_of_a_file_is_detected(root: Path) -> None:
    path = blob(root, "x", "optimizer.safetensors")
    flipped = every_bit(path.read_bytes())
    assert flipped
    for damaged in flipped:
        path.write_bytes(damaged)
        named = rf"checkpoint tinker://{RUN}/weights/x is damaged: optimizer\.safetensors"
        with pytest.raises(CheckpointDamaged, match=named):
            served(root)


def test_flip_of_any_bit_of_a_manifest_is_detected(root: Path) -> None:
    flipped = every_bit(manifest_file(root, "x").read_bytes())
    assert flipped
    for damaged in flipped:
        with pytest.raises(CheckpointDamaged, match="checkpoint x: "):
            Manifest.decode(damaged, "checkpoint x")


def test_any_other_length_of_a_file_or_manifest_is_detected(root: Path) -> None:
    path = blob(root, "x", "adapter.safetensors")
    content = path.read_bytes()
    assert content
    for damaged in [content[:length] for length in range(len(content))] + [content + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(
            CheckpointDamaged, match=r"x is damaged: adapter\.safetensors has \d+ bytes"
        ):
            served(root)
    content = manifest_file(root, "x").read_bytes()
    assert content
    for damaged in [content[:length] for length in range(len(content))]:
        with pytest.raises(CheckpointDamaged):
            Manifest.decode(damaged, "x")
    for more in (b"\0", b" ", b"\n", b"{}"):
        with pytest.raises(CheckpointDamaged):
            Manifest.decode(content + more, "x")


def test_swapped_bytes_are_detected(root: Path) -> None:
    path = blob(root, "x", "adapter.safetensors")
    swapped = bytearray(path.read_bytes())
    swapped[0], swapped[1] = swapped[1], swapped[0]
    path.write_bytes(swapped)
    with pytest.raises(CheckpointDamaged, match="adapter"):
        served(root)
    content = manifest_file(root, "x").read_bytes()
    tried = 0
    for at in range(len(content) - 1):
        first, second = content[at : at + 1], content[at + 1 : at + 2]
        if first != second:
            with pytest.raises(CheckpointDamaged):
                Manifest.decode(content[:at] + second + first + content[at + 2 :], "x")
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("size", [1, 4096, (1 << 20) - 1, 1 << 20, (8 << 20) + 1])
@pytest.mark.parametrize("damage", ["zeros", "first", "last"])
def test_damage_is_detected_in_files_of_any_size(tmp_path: Path, size: int, damage: str) -> None:
    vault = Vault(tmp_path)
    content = b"\1" * size
    manifest = save(vault, "x", {"a": content})
    path = blob(tmp_path, "x", "a")
    path.write_bytes(
        {"zeros": bytes(size), "first": b"\0" + content[1:], "last": content[:-1] + b"\0"}[damage]
    )
    with pytest.raises(CheckpointDamaged, match="a hashes to"):
        vault.read(manifest, "a")


def _swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    shutil.copyfile(second, first)
    second.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], type[VaultError], str]] = {
    "files swapped": (
        lambda root: _swap(
            blob(root, "x", "adapter.safetensors"), blob(root, "y", "adapter.safetensors")
        ),
        CheckpointDamaged,
        "x is damaged: adapter.safetensors hashes to",
    ),
    "manifests swapped": (
        lambda root: _swap(manifest_file(root, "x"), manifest_file(root, "y")),
        CheckpointDamaged,
        "x: the manifest there is that of checkpoint .*/y",
    ),
    "file deleted": (
        lambda root: blob(root, "x", "optimizer.safetensors").unlink(),
        CheckpointDamaged,
        "x is damaged: optimizer.safetensors is missing",
    ),
    "manifest deleted": (
        lambda root: manifest_file(root, "x").unlink(),
        CheckpointNotFound,
        "x does not exist",
    ),
    "manifest zeroed": (
        lambda root: manifest_file(root, "x").write_bytes(bytes(900)),
        CheckpointDamaged,
        "x: the manifest can't be read",
    ),
    "manifest of another shape": (
        lambda root: manifest_file(root, "x").write_bytes(b'["self"]'),
        CheckpointDamaged,
        "x: the manifest can't be read",
    ),
    "manifest without end": (
        lambda root: manifest_file(root, "x").write_bytes(b"[" * 200_000),
        CheckpointDamaged,
        "x: the manifest can't be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_nothing_is_served(root: Path, tmp_path: Path, damage: str) -> None:
    do, error, text = DAMAGES[damage]
    do(root)
    with pytest.raises(error, match=text):
        served(root)


@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoint_exports_nothing_and_another_one_loads(
    root: Path, tmp_path: Path, file: str
) -> None:
    vault = Vault(root)
    path = blob(root, "x", file)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_bytes(b"of an earlier export")
    with pytest.raises(CheckpointDamaged, match=file):
        export(vault, vault.manifest("training", RUN, "x"), tmp_path / "out")
    assert [p.read_bytes() for p in (tmp_path / "out").iterdir()] == [b"of an earlier export"]
    assert load(vault, vault.manifest("training", RUN, "y")) == OTHER


def test_damaged_manifest_stops_a_collection_before_it_removes_anything(root: Path) -> None:
    vault = Vault(root)
    manifest_file(root, "x").write_bytes(b"{}")
    with pytest.raises(CheckpointDamaged, match="x"):
        gc.collect(vault, 0)
    assert len(list(root.glob("blobs/*/*"))) == 4


def test_save_of_the_same_content_repairs_a_damaged_file(root: Path) -> None:
    path = blob(root, "x", "adapter.safetensors")
    path.write_bytes(b"\0" * path.stat().st_size)
    save(Vault(root), "z", FILES)
    assert served(root) == FILES
