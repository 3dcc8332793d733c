"""Verified reader: returns only verified bytes, and reproducible tar archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.vault import CheckpointDamaged, Vault, verified_reader
from everstep.vault.download_content import Content, archive_content, file_content
from everstep.vault.storage.keys import blob_key
from everstep.vault.verified_reader import VerifiedReader
from tests.profiles import example_count
from tests.vault.checkpoints import save

BLOCK = 64
FILES = {"a": b"", "b": bytes(range(200)), "c": b"x" * BLOCK, "d": b"yz" * BLOCK}


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verified_reader, "BLOCK", BLOCK)
        yield


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    return Vault(tmp_path_factory.mktemp("vault"))


@pytest.fixture(scope="module")
def content(vault: Vault) -> Content:
    return archive_content(save(vault, "ranges", FILES))


def whole(reader: VerifiedReader, content: Content) -> bytes:
    return b"".join(reader.read(content, 0, content.size))


@example_count(200)
@given(start=st.integers(0, 6000), length=st.integers(0, 6000))
def test_read_returns_any_range_of_the_content(
    vault: Vault, content: Content, start: int, length: int
) -> None:
    reader = VerifiedReader(vault)
    data = whole(reader, content)
    assert len(data) == content.size
    part = b"".join(reader.read(content, start, min(start + length, content.size)))
    assert part == data[start : start + length]
    assert reader.sha256(content) == hashlib.sha256(data).digest()


def test_tar_contains_the_files_and_ends_with_the_completion_marker(vault: Vault) -> None:
    manifest = save(vault, "tar", FILES)
    data = whole(VerifiedReader(vault), archive_content(manifest))
    assert len(data) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert list(found)[-1] == "checkpoint_complete"
    assert found == {**FILES, "manifest.json": manifest.encode(), "checkpoint_complete": b""}
    again = whole(VerifiedReader(vault), archive_content(vault.manifest(*manifest.id)))
    assert again == data


def test_tar_header_supports_files_above_eight_gigabytes(vault: Vault) -> None:
    manifest = save(vault, "large", {"a": b"1"}, kind="sampler")
    large = manifest.files["a"].model_copy(update={"size": 9 << 30})
    changed = manifest.model_copy(update={"files": {"a": large}})
    header = archive_content(changed).parts[0]
    assert isinstance(header, bytes)
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 9 << 30


def flips(data: bytes) -> Iterator[bytes]:
    for at in (0, len(data) // 2, len(data) - 1):
        yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [*flips(FILES["b"]), FILES["b"][:-1], b"", FILES["b"] + b"!"])
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_reader_never_returns_damaged_bytes(tmp_path: Path, damage: bytes, known: bool) -> None:
    vault = Vault(tmp_path)
    content = file_content(save(vault, "b", FILES), "b")
    reader = VerifiedReader(vault)
    if known:
        reader.sha256(content)
    key = blob_key(content.manifest.files["b"].blake3)
    (tmp_path / key).write_bytes(damage)
    got = b""
    with pytest.raises(CheckpointDamaged) as raised:
        for block in reader.read(content, 0, content.size):
            got += block
        assert damage != FILES["b"] + b"!", "damage within the file was not detected"
        raise CheckpointDamaged("", key)
    assert raised.value.key == key
    assert FILES["b"].startswith(got)
    if not known:
        assert got == b""
        with pytest.raises(CheckpointDamaged):
            reader.sha256(content)


def test_cache_of_block_hashes_is_bounded(vault: Vault) -> None:
    reader = VerifiedReader(vault, max_blocks=3)
    content = archive_content(save(vault, "few", FILES))
    data = whole(reader, content)
    assert reader._blocks
    assert sum(map(len, reader._blocks.values())) <= 3 * 32
    assert whole(reader, content) == data
