"""Disk guard: rejects writes that don't fit before they start, and leaves no partial files."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.vault import DiskFull, Vault, gc
from everstep.vault.disk_guard import readable
from everstep.worker.checkpoint_io import write_checkpoint
from tests.vault.checkpoints import RUN, load, save

MIB = 1 << 20


class Capture:
    """A stand-in for the engine's captured state."""

    def __init__(self, *sizes: int) -> None:
        self.meta = {"step": 3}
        self.sizes = sizes
        self.released = False

    def prepare(self) -> None:
        pass

    def files(self, *, once: bool) -> dict[str, list[bytes]]:
        return {f"f{index}": [bytes(size)] for index, size in enumerate(self.sizes)}

    def release(self) -> None:
        self.released = True


DRAFT: dict[str, Any] = {
    "kind": "training",
    "run_id": RUN,
    "name": "big",
    "base_model": "m",
    "base_fingerprint": "f",
    "lora": {},
    "optimizer": None,
    "user_metadata": None,
    "expires_at": None,
    "position": 3,
}


def files_in(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def set_free_space(vault: Vault, free: int) -> None:
    vault.storage.free = lambda: free  # type: ignore[method-assign]


def test_save_that_does_not_fit_fails_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault(tmp_path, reserve_bytes=MIB)
    set_free_space(vault, 3 * MIB)
    capture = Capture(MIB, MIB, MIB)  # each one fits, the sum does not

    def never(*_: object) -> int:
        raise AssertionError("a byte was written")

    with monkeypatch.context() as patched, pytest.raises(DiskFull) as failure:
        patched.setattr(os, "write", never)
        write_checkpoint(vault, capture, DRAFT, {})  # type: ignore[arg-type]
    assert capture.released
    text = str(failure.value)
    assert str(tmp_path) in text and "4.0 MiB" in text and "3.0 MiB are free" in text
    assert (failure.value.needed, failure.value.free) == (4 * MIB, 3 * MIB)
    assert failure.value.errno == errno.ENOSPC
    assert files_in(tmp_path) == []
    set_free_space(vault, 4 * MIB)
    write_checkpoint(vault, capture, DRAFT, {})  # type: ignore[arg-type]
    assert vault.manifest("training", RUN, "big").size == 3 * MIB


def test_overwrite_that_does_not_fit_fails_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    vault = Vault(tmp_path, reserve_bytes=10)
    old = save(vault, "x", {"a": b"old"})
    before = files_in(tmp_path)
    set_free_space(vault, 12)
    with pytest.raises(DiskFull, match=r"room for 3 bytes more: with the reserve of 10 bytes"):
        save(vault, "x", {"a": b"new"}, overwrite=True)
    assert files_in(tmp_path) == before
    assert load(vault, old) == {"a": b"old"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("size_unknown", [True, False])
def test_disk_that_fills_up_during_a_write_raises_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, size_unknown: bool
) -> None:
    vault = Vault(tmp_path)
    content = [b"x" * 100, b"y" * 100]
    real, calls = os.write, iter(range(9))

    def write(handle: int, data: memoryview) -> int:
        if next(calls) == 1:
            raise OSError(code, os.strerror(code))
        return real(handle, data)

    chunks: Iterator[bytes] | list[bytes] = iter(content) if size_unknown else content
    with monkeypatch.context() as patched, pytest.raises(DiskFull, match=f"{tmp_path}: the disk"):
        patched.setattr(os, "write", write)
        vault.put(chunks)
    assert files_in(tmp_path) == []
    vault.put(content)


def test_other_errors_are_not_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = Vault(tmp_path)

    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output") as failure:
        vault.put([b"x"])
    assert not isinstance(failure.value, DiskFull)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=64", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    yield small
    subprocess.run(["umount", "-l", str(small)], check=True)


def test_full_file_system_keeps_no_partial_file(small_disk: Path) -> None:
    vault = Vault(small_disk / "vault", reserve_bytes=MIB // 2)
    old = save(vault, "x", {"a": b"1" * 2 * MIB})
    before = files_in(small_disk)
    with pytest.raises(DiskFull):
        save(vault, "y", {"a": b"2" * 2 * MIB})
    with pytest.raises(DiskFull):
        vault.put(iter([b"3" * MIB] * 3))  # of unknown size: the write itself fails
    assert files_in(small_disk) == before
    assert load(vault, old) == {"a": b"1" * 2 * MIB}
    vault.delete("training", RUN, "x")  # deletion needs no space
    gc.collect(vault, 0)
    save(vault, "y", {"a": b"2" * 2 * MIB})


def test_disk_without_inodes_raises_disk_full(small_disk: Path) -> None:
    vault = Vault(small_disk / "vault")
    for number in range(64):
        try:
            (small_disk / f"{number}").touch()
        except OSError:
            break
    with pytest.raises(DiskFull, match="there is no room"):
        vault.put([b"x"])


def test_sizes_are_formatted_with_units() -> None:
    sizes = [0, 1023, 1024, 1536, 5 << 30, 1 << 55]
    found = [readable(size) for size in sizes]
    assert found == ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "5.0 GiB", "32768.0 TiB"]
