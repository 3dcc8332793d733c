"""Storage contract: every storage of the vault, in a directory and in a bucket."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from everstep.durable_files import Buffer
from everstep.vault.errors import UnsafeName
from everstep.vault.storage.base import NewContent, Storage
from everstep.vault.storage.local import LocalStorage
from tests.buckets.bucket import Bucket
from tests.vault.disk import Dead, Disk


@pytest.fixture(params=["directory", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, bucket: Bucket) -> Storage:
    if request.param == "directory":
        return LocalStorage(tmp_path / "s")
    return bucket.storage()


def everything(bucket: Bucket, tmp_path: Path) -> dict[str, bytes]:
    """Return all files below the test's directory and all objects of the bucket."""
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
def test_read_returns_the_written_content(storage: Storage, chunks: list[Buffer]) -> None:
    content = b"".join(bytes(memoryview(chunk)) for chunk in chunks)
    assert write(storage, "a/b", *chunks) == "a/b"
    assert bytes(storage.read("a/b")) == content
    assert storage.size("a/b") == len(content)
    assert abs(storage.modified("a/b") - time.time()) < 60


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 5 << 20, (5 << 20) + 10, 1 << 30])
@pytest.mark.parametrize("cold", [False, True])
def test_chunks_can_start_at_any_byte(storage: Storage, start: int, cold: bool) -> None:
    content = b"0123456789" + bytes(5 << 20)
    write(storage, "a/b", content)
    read = b"".join(bytes(chunk) for chunk in storage.chunks("a/b", start=start, cold=cold))
    assert read == content[start:]


def test_empty_array_writes_no_bytes(storage: Storage) -> None:
    numpy = pytest.importorskip("numpy")
    write(storage, "a", b"1", numpy.empty((0, 3)).data, b"2")
    assert bytes(storage.read("a")) == b"12"


def test_key_is_requested_after_the_last_chunk(storage: Storage) -> None:
    seen: list[bytes] = []

    def chunks() -> Iterator[bytes]:
        for chunk in (b"a", b"b"):
            seen.append(chunk)
            yield chunk

    key = storage.write(chunks(), lambda: b"".join(seen).decode(), replace=True)
    assert key == "ab"
    assert bytes(storage.read("ab")) == b"ab"


def test_missing_key_is_reported(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("a/b")
    with pytest.raises(FileNotFoundError):
        storage.modified("a/b")
    assert storage.size("a/b") is None
    assert storage.delete("a/b") is False
    assert list(storage.keys("a/")) == []
    storage.sync("a/")


def test_existing_key_is_rejected_or_replaced(storage: Storage) -> None:
    write(storage, "k", b"old", replace=False)
    with pytest.raises(FileExistsError):
        write(storage, "k", b"new", replace=False)
    assert bytes(storage.read("k")) == b"old"
    write(storage, "k", b"new")
    assert bytes(storage.read("k")) == b"new"


def test_content_already_read_is_unchanged_by_replacement_and_deletion(
    storage: Storage,
) -> None:
    write(storage, "k", b"old")
    held = storage.read("k")
    write(storage, "k", b"new")
    assert bytes(held) == b"old"
    held = storage.read("k")
    storage.delete("k")
    assert bytes(held) == b"new"


def test_one_of_several_concurrent_writers_wins(storage: Storage) -> None:
    together = threading.Barrier(8)
    winners: list[int] = []

    def work(number: int) -> None:
        together.wait()
        try:
            write(storage, "d/k", b"%d" % number * 1000, replace=False)
            winners.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert bytes(storage.read("d/k")) == b"%d" % winners[0] * 1000


def contents(*files: tuple[str, bytes]) -> list[NewContent]:
    return [NewContent([content], partial(str, key), len(content)) for key, content in files]


def test_files_written_together_are_all_there(storage: Storage) -> None:
    write(storage, "a/1", b"old")
    storage.write_all(contents(("a/1", b"one"), ("b/2", b""), ("c/3", bytes(20 << 20))))
    assert [bytes(storage.read(key)) for key in ("a/1", "b/2", "c/3")] == [
        b"one",
        b"",
        bytes(20 << 20),
    ]


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_last_file_appears_only_if_all_others_were_written(storage: Storage, fails: int) -> None:
    files = contents(("a/0", b"0"), ("b/1", b"1"), ("m/2", b"2"))

    def broken() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError

    files[fails] = NewContent(broken(), files[fails].key_of)
    with pytest.raises(RuntimeError):
        storage.write_all(files[:2], files[2])
    assert storage.size("m/2") is None


def test_last_file_is_rejected_where_its_key_is_taken(storage: Storage) -> None:
    write(storage, "m/2", b"old")
    *files, last = contents(("a/0", b"0"), ("m/2", b"new"))
    with pytest.raises(FileExistsError):
        storage.write_all(files, last, replace=False)
    assert bytes(storage.read("m/2")) == b"old"
    *files, last = contents(("a/0", b"0"), ("m/2", b"new"))
    storage.write_all(files, last, replace=True)
    assert bytes(storage.read("m/2")) == b"new"


@pytest.mark.parametrize("key", ["a/b", "blobs/ab/" + "ab" * 32, "quarantine/content/k"])
def test_moved_file_exists_under_its_new_key_only(storage: Storage, key: str) -> None:
    assert not storage.move(key, "z/moved")
    write(storage, key, b"content")
    write(storage, "z/moved", b"what was there")
    assert storage.move(key, "z/moved")
    assert (storage.size(key), bytes(storage.read("z/moved"))) == (None, b"content")
    assert list(storage.keys("z/")) == ["z/moved"]


def test_deleted_key_can_be_written_again(storage: Storage) -> None:
    for content in (b"one", b"two", b"three"):
        write(storage, "d/k", content, replace=False)
        assert b"".join(map(bytes, storage.chunks("d/k"))) == content
        assert storage.delete("d/k")
        assert not storage.delete("d/k")
        assert storage.size("d/k") is None
    storage.sync("d/")
    assert list(storage.keys("d/")) == []


def test_keys_lists_a_prefix_only(storage: Storage) -> None:
    for key in ("a/2", "a/b/1", "ab/3", "c"):
        write(storage, key, b"")
    assert list(storage.keys("a/")) == ["a/2", "a/b/1"]
    assert storage.delete("a/2")
    assert list(storage.keys("a/")) == ["a/b/1"]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_nothing(
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
    assert bytes(storage.read("k")) == b"old"
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
def test_unsafe_key_is_rejected(storage: Storage, bucket: Bucket, tmp_path: Path, key: str) -> None:
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


# Local directory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls that make files durable or visible, in order."""
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
def test_write_syncs_data_then_names_it_then_syncs_the_directory(
    tmp_path: Path, calls: list[str], replace: bool
) -> None:
    storage = LocalStorage(tmp_path)
    write(storage, "d/first", b"")
    calls.clear()
    write(storage, "d/k", b"x", replace=replace)
    steps = [call for call in calls if not call.startswith("unlink")]
    assert steps == ["fsync data", "name k", "fsync d"]


def test_rejected_write_names_nothing(tmp_path: Path, calls: list[str]) -> None:
    storage = LocalStorage(tmp_path)
    write(storage, "d/k", b"")
    calls.clear()
    with pytest.raises(FileExistsError):
        write(storage, "d/k", b"x", replace=False)
    assert calls
    assert [call for call in calls if call.startswith("name")] == []


def test_new_directories_are_durable_from_the_top_before_a_name_appears(
    tmp_path: Path, calls: list[str]
) -> None:
    storage = LocalStorage(tmp_path / "new" / "root")
    calls.clear()
    write(storage, "a/b/k", b"x")
    synced = [call for call in calls if call.startswith(("fsync", "name"))]
    assert synced == ["fsync data", "fsync root", "fsync a", "name k", "fsync b"]


def test_last_name_appears_when_all_other_names_are_durable(
    tmp_path: Path, calls: list[str]
) -> None:
    storage = LocalStorage(tmp_path)
    for key in ("a/old", "b/old", "m/old"):
        write(storage, key, b"")
    calls.clear()
    *files, last = contents(("a/k0", b"0"), ("b/k1", b"1"), ("m/k2", b"2"))
    storage.write_all(files, last)
    steps = [call for call in calls if not call.startswith("unlink")]
    assert steps[:3] == ["fsync data"] * 3
    assert steps[3:5] == ["name k0", "name k1"]
    assert sorted(steps[5:7]) == ["fsync a", "fsync b"]
    assert steps[7:] == ["name k2", "fsync m"]


def test_deletion_is_durable(tmp_path: Path, calls: list[str]) -> None:
    storage = LocalStorage(tmp_path)
    write(storage, "d/k", b"")
    calls.clear()
    assert storage.delete("d/k")
    assert calls == ["unlink k", "fsync d"]


def test_failed_fsync_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert bytes(storage.read("k")) == b"old"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_clean_removes_only_the_leftovers_of_a_crash(tmp_path: Path) -> None:
    with Disk(tmp_path) as disk:
        storage = LocalStorage(disk.home)
        write(storage, "k", b"old")
        disk.fail_after(2, "kill")
        with pytest.raises(Dead):
            write(storage, "k", b"new")
        disk.restart("kill")
        storage = LocalStorage(disk.home)
        assert len(list((disk.home / "tmp").iterdir())) == 1
        storage.clean()
        assert list((disk.home / "tmp").iterdir()) == []
        assert bytes(storage.read("k")) == b"old"
