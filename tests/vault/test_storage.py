"""What every storage of the vault promises: in a directory, in a bucket."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.vault.errors import UnsafeName
from everstep.vault.local import LocalStorage
from everstep.vault.storage import Buffer, Storage
from tests.buckets.bucket import Bucket
from tests.vault.disk import Dead, Disk


@pytest.fixture(params=["directory", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, bucket: Bucket) -> Storage:
    if request.param == "directory":
        return LocalStorage(tmp_path / "s")
    return bucket.storage()


def everything(bucket: Bucket, tmp_path: Path) -> dict[str, bytes]:
    """All that lies in the storage, or beside it."""
    files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    return files | bucket.objects()


def write(storage: Storage, key: str, *chunks: Buffer, replace: bool = True) -> str:
    return storage.write(chunks, lambda: key, replace=replace)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [b""],
        [b"one"],
        [b"", b"a", b"", b"b"],
        [bytearray(b"array"), memoryview(b"view")],
        [memoryview(b"x" * 12).cast("B", (3, 4))],
        [bytes(20 << 20)],  # more than one write
    ],
    ids=["nothing", "empty", "one", "some", "kinds", "matrix", "large"],
)
def test_what_is_written_is_read(storage: Storage, chunks: list[Buffer]) -> None:
    content = b"".join(bytes(memoryview(chunk)) for chunk in chunks)
    assert write(storage, "a/b", *chunks) == "a/b"
    assert storage.read("a/b") == content
    assert storage.size("a/b") == len(content)
    assert abs(storage.modified("a/b") - time.time()) < 60


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 5 << 20, (5 << 20) + 10, 1 << 30])
@pytest.mark.parametrize("cold", [False, True])
def test_a_part_is_read_from_any_byte_on(storage: Storage, start: int, cold: bool) -> None:
    content = b"0123456789" + bytes(5 << 20)
    write(storage, "a/b", content)
    read = b"".join(bytes(chunk) for chunk in storage.chunks("a/b", start=start, cold=cold))
    assert read == content[start:]


def test_an_array_without_elements_is_no_bytes(storage: Storage) -> None:
    numpy = pytest.importorskip("numpy")
    write(storage, "a", b"1", numpy.empty((0, 3)).data, b"2")
    assert storage.read("a") == b"12"


def test_the_key_is_asked_for_after_the_last_chunk(storage: Storage) -> None:
    seen: list[bytes] = []

    def chunks() -> Iterator[bytes]:
        for chunk in (b"a", b"b"):
            seen.append(chunk)
            yield chunk

    key = storage.write(chunks(), lambda: b"".join(seen).decode(), replace=True)
    assert key == "ab"
    assert storage.read("ab") == b"ab"


def test_what_is_not_there_is_said_so(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("a/b")
    with pytest.raises(FileNotFoundError):
        storage.modified("a/b")
    assert storage.size("a/b") is None
    assert storage.delete("a/b") is False
    assert list(storage.keys("a/")) == []
    storage.sync("a/")


def test_a_taken_key_is_refused_or_replaced(storage: Storage) -> None:
    write(storage, "k", b"old", replace=False)
    with pytest.raises(FileExistsError):
        write(storage, "k", b"new", replace=False)
    assert storage.read("k") == b"old"
    write(storage, "k", b"new")
    assert storage.read("k") == b"new"


def test_what_was_read_stays_as_it_was_when_the_key_is_replaced_or_deleted(
    storage: Storage,
) -> None:
    write(storage, "k", b"old")
    held = storage.read("k")
    write(storage, "k", b"new")
    assert held == b"old"
    held = storage.read("k")
    storage.delete("k")
    assert held == b"new"


def test_of_writers_at_the_same_time_one_wins(storage: Storage) -> None:
    together = threading.Barrier(8)
    won: list[int] = []

    def work(number: int) -> None:
        together.wait()
        try:
            write(storage, "d/k", b"%d" % number * 1000, replace=False)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("d/k") == b"%d" % won[0] * 1000


@pytest.mark.parametrize("key", ["a/b", "blobs/ab/" + "ab" * 32, "quarantine/content/k"])
def test_what_was_moved_lies_under_its_new_key_only(storage: Storage, key: str) -> None:
    assert not storage.move(key, "z/moved")
    write(storage, key, b"content")
    write(storage, "z/moved", b"what was there")
    assert storage.move(key, "z/moved")
    assert (storage.size(key), storage.read("z/moved")) == (None, b"content")
    assert list(storage.keys("z/")) == ["z/moved"]


def test_what_was_deleted_can_be_written_again(storage: Storage) -> None:
    for content in (b"one", b"two", b"three"):
        write(storage, "d/k", content, replace=False)
        assert b"".join(map(bytes, storage.chunks("d/k"))) == content
        assert storage.delete("d/k")
        assert not storage.delete("d/k")
        assert storage.size("d/k") is None
    storage.sync("d/")
    assert list(storage.keys("d/")) == []


def test_keys_are_listed_under_a_prefix_and_no_other(storage: Storage) -> None:
    for key in ("a/2", "a/b/1", "ab/3", "c"):
        write(storage, key, b"")
    assert list(storage.keys("a/")) == ["a/2", "a/b/1"]
    assert storage.delete("a/2")
    assert list(storage.keys("a/")) == ["a/b/1"]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_is_broken_off_leaves_nothing(
    storage: Storage,
    bucket: Bucket,
    tmp_path: Path,
    fault: type[BaseException],
    large: bool,
) -> None:
    write(storage, "k", b"old")
    before = everything(bucket, tmp_path)

    def chunks() -> Iterator[bytes]:
        yield b"half"
        if large:
            yield bytes(20 << 20)
        raise fault

    with pytest.raises(fault):
        storage.write(chunks(), lambda: "k", replace=True)
    assert storage.read("k") == b"old"
    assert everything(bucket, tmp_path) == before


BAD_KEYS = [
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/..",
    "./a",
    "a//b",
    "a/",
    "a\0b",
    "a\nb",
    "a\\..\\b",
    "\u202egnp.exe",
    "\ud800",
]


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_no_key_leads_elsewhere(storage: Storage, bucket: Bucket, tmp_path: Path, key: str) -> None:
    (tmp_path / "x").write_bytes(b"outside")
    before = everything(bucket, tmp_path)
    for work in (
        lambda: write(storage, key, b"evil"),
        lambda: write(storage, key, b"evil", replace=False),
        lambda: storage.read(key),
        lambda: storage.size(key),
        lambda: storage.modified(key),
        lambda: storage.delete(key),
        lambda: list(storage.keys(key + "/")),
        lambda: storage.sync(key + "/"),
    ):
        with pytest.raises(UnsafeName):
            work()
    assert everything(bucket, tmp_path) == before


# A directory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that make something durable or visible, in order."""
    made: list[str] = []

    def watch(name: str, label: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            result = real(*arguments)
            made.append(label(*arguments))
            return result

        monkeypatch.setattr(os, name, call)

    def fsync(handle: int) -> str:
        target = Path(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: PTH115
        return f"fsync {target.name if target.is_dir() else 'data'}"

    watch("fsync", fsync)
    watch("replace", lambda _, target: f"name {Path(target).name}")
    watch("rename", lambda _, target: f"name {Path(target).name}")
    watch("link", lambda _, target: f"name {Path(target).name}")
    watch("unlink", lambda target: f"unlink {Path(target).name[:1]}")
    watch("mkdir", lambda target, *_: f"mkdir {Path(target).name}")
    return made


@pytest.mark.parametrize("replace", [True, False])
def test_data_then_name_then_directory(tmp_path: Path, calls: list[str], replace: bool) -> None:
    storage = LocalStorage(tmp_path)
    write(storage, "d/first", b"")
    calls.clear()
    write(storage, "d/k", b"x", replace=replace)
    steps = [call for call in calls if not call.startswith("unlink")]
    assert steps == ["fsync data", "name k", "fsync d"]


def test_a_refused_write_names_nothing(tmp_path: Path, calls: list[str]) -> None:
    storage = LocalStorage(tmp_path)
    write(storage, "d/k", b"")
    calls.clear()
    with pytest.raises(FileExistsError):
        write(storage, "d/k", b"x", replace=False)
    assert not [call for call in calls if call.startswith("name")]


def test_new_directories_are_durable_from_the_top_before_they_hold_a_name(
    tmp_path: Path, calls: list[str]
) -> None:
    storage = LocalStorage(tmp_path / "new" / "root")
    calls.clear()
    write(storage, "a/b/k", b"x")
    synced = [call for call in calls if call.startswith(("fsync", "name"))]
    assert synced == ["fsync data", "fsync root", "fsync a", "name k", "fsync b"]


def test_a_deletion_is_durable(tmp_path: Path, calls: list[str]) -> None:
    storage = LocalStorage(tmp_path)
    write(storage, "d/k", b"")
    calls.clear()
    assert storage.delete("d/k")
    assert calls == ["unlink k", "fsync d"]


def test_a_failed_fsync_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    write(storage, "k", b"old")
    tried: list[int] = []

    def fsync(handle: int) -> None:
        tried.append(handle)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        write(storage, "k", b"new")
    assert len(tried) == 1
    assert storage.read("k") == b"old"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_a_crash_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        storage = LocalStorage(disk.home)
        write(storage, "k", b"old")
        disk.fall(2, "kill")
        with pytest.raises(Dead):
            write(storage, "k", b"new")
        disk.restart("kill")
        storage = LocalStorage(disk.home)
        assert len(list((disk.home / "tmp").iterdir())) == 1
        storage.clean()
        assert list((disk.home / "tmp").iterdir()) == []
        assert storage.read("k") == b"old"
