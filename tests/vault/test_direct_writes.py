"""Direct writes: the same bytes as through the file cache, whatever the system can and refuses."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from everstep.vault import Vault
from everstep.vault.storage import direct
from everstep.vault.storage.direct import BLOCK, write_direct
from tests.vault.checkpoints import load, save_at_once, written_directly

STAGE = 2 * BLOCK
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT")


def memory(size: int, seed: int = 0) -> memoryview:
    """Bytes that begin at a page."""
    view = memoryview(mmap.mmap(-1, size))
    view[:] = random.Random(seed).randbytes(size)
    return view


def write(path: Path, chunks: Iterable[memoryview]) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with written_directly(STAGE):
            write_direct(handle, chunks)
    finally:
        os.close(handle)


def is_direct(handle: int) -> bool:
    return bool(fcntl.fcntl(handle, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Record whether each write is direct, and its bytes."""
    seen: list[tuple[bool, int]] = []
    real = os.write

    def recording(handle: int, data: memoryview) -> int:
        count = real(handle, data)
        seen.append((is_direct(handle), count))
        return count

    monkeypatch.setattr(os, "write", recording)
    return seen


@pytest.mark.parametrize("support", ["full", "none", "refused", "short"])
def test_file_holds_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, support: str
) -> None:
    real = os.write

    def limited(handle: int, data: memoryview) -> int:
        if support == "refused" and is_direct(handle):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if support == "short":
            data = data[:BLOCK] if is_direct(handle) else data[:1000]
        return real(handle, data)

    if support == "none":
        monkeypatch.setattr(direct, "_FLAG", None)
    monkeypatch.setattr(os, "write", limited)
    chance = random.Random(1)
    for number in range(40):
        source = memory(20 * BLOCK, number)
        cuts = chance.choices(range(len(source)), k=chance.randrange(6))
        cuts = [cut - cut % BLOCK if chance.random() < 0.5 else cut for cut in cuts]
        ends = sorted([0, *cuts, len(source) - chance.randrange(2 * BLOCK)])
        chunks = [source[begin:end] for begin, end in pairwise(ends)]
        path = tmp_path / str(number)
        write(path, chunks)
        assert path.read_bytes() == b"".join(map(bytes, chunks))


def test_short_write_that_ends_within_a_block_goes_on_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.write, iter(range(99))

    def interrupted(handle: int, data: memoryview) -> int:
        if next(calls) == 0 and is_direct(handle):
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            count = real(handle, data[:100])
            fcntl.fcntl(handle, fcntl.F_SETFL, flags)
            return count
        return real(handle, data)

    monkeypatch.setattr(os, "write", interrupted)
    source = memory(7 * BLOCK)
    write(tmp_path / "a", [source])
    assert (tmp_path / "a").read_bytes() == bytes(source)


@on_linux
def test_all_but_the_last_block_is_written_directly(
    tmp_path: Path, writes: list[tuple[bool, int]]
) -> None:
    source = memory(9 * BLOCK + 5)
    write(tmp_path / "a", [source[:7], source[7:]])
    assert sum(count for directly, count in writes if directly) == 9 * BLOCK
    assert [count for directly, count in writes if not directly] == [5]


@on_linux
def test_aligned_chunks_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [memory(BLOCK), memory(8 * BLOCK, 1), memory(5 * BLOCK, 2)]
    monkeypatch.setattr(direct, "_copy", lambda *_: pytest.fail("copied"))
    write(tmp_path / "a", chunks)
    assert (tmp_path / "a").read_bytes() == b"".join(map(bytes, chunks))


@pytest.mark.parametrize("failing", range(4))
def test_full_disk_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    real, calls = os.write, iter(range(99))

    def full(handle: int, data: memoryview) -> int:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a", [memory(9 * BLOCK)[3:]])


def test_chunks_that_fail_wait_for_the_stage_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, failed = threading.Event(), threading.Event()
    real = os.write

    def held(handle: int, data: memoryview) -> int:
        assert gate.wait(60)
        return real(handle, data)

    def broken() -> Iterator[memoryview]:
        yield memory(3 * BLOCK)[1:]
        failed.set()
        raise RuntimeError

    monkeypatch.setattr(os, "write", held)
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write, tmp_path / "a", broken())
        assert failed.wait(60)
        with pytest.raises(TimeoutError):
            writing.result(timeout=0.2)
        gate.set()
        with pytest.raises(RuntimeError):
            writing.result()
    assert (tmp_path / "a").stat().st_size == STAGE


@on_linux
def test_large_files_of_a_cold_checkpoint_are_written_directly(
    tmp_path: Path, writes: list[tuple[bool, int]]
) -> None:
    vault = Vault(tmp_path)
    contents = {"a": bytes(memory(direct.MIN_BYTES + 3)), "b": b"small"}
    for cold in (False, True):
        writes.clear()
        manifest = save_at_once(vault, f"{cold}", contents, cold=cold)
        directly = sum(count for directly, count in writes if directly)
        assert directly == (direct.MIN_BYTES if cold else 0)
        assert load(vault, manifest) == contents
