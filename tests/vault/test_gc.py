"""Garbage collection during saves: removes no file that a present or coming checkpoint needs."""

from __future__ import annotations

import fcntl
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.vault import CheckpointDamaged, CheckpointNotFound, FileRef, Vault, gc
from everstep.vault.gc_journal import NAME, GcJournal
from everstep.vault.storage.keys import BLOBS, blob_key
from everstep.vault.storage.local import LocalStorage
from tests.vault.checkpoints import RUN, draft, load, save

FILES = {"a": b"content", "b": b"other"}
HOOKED = ("keys", "sync", "size", "modified", "delete")


class Hooked:
    """A storage that calls a hook before each call of a collection after which others may write.

    Args:
        vault: the vault. While the collection decides about a file, all writers wait.
        root: its directory.
        hook: the hook.
    """

    def __init__(self, vault: Vault, root: Path, hook: Callable[[], None]) -> None:
        self._storage = vault.storage
        self._journal = root / NAME
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        if name in HOOKED and self._is_free():
            self._hook()
        return getattr(self._storage, name)

    def _is_free(self) -> bool:
        with self._journal.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


class Saver:
    """A save in the steps of the service and its worker.

    Args:
        vault: the worker's vault.
        pins: the pins of the ledger.
    """

    def __init__(self, vault: Vault, pins: set[str]) -> None:
        self._steps = self._save(vault, pins)
        self.done = 0

    def _save(self, vault: Vault, pins: set[str]) -> Iterator[None]:
        pins.add("save")
        yield
        refs = {}
        for name, content in FILES.items():
            refs[name] = vault.put([content])
            yield
        vault.commit(draft("x", refs))
        yield
        pins.discard("save")
        yield

    def advance(self, upto: int) -> None:
        """Take steps until this many are done."""
        while self.done < upto:
            next(self._steps)
            self.done += 1


STEPS = 5


def interleave(root: Path, schedule: Sequence[int], *, stored_before: bool, pinned: bool) -> int:
    """Collect, and take each step of a save before its scheduled call of the collection.

    Call 0 is before the collection.

    Returns:
        The number of calls that the collection made.
    """
    worker, service = Vault(root), Vault(root, writer=False)
    worker.put([b"garbage"])
    if stored_before:
        for content in FILES.values():
            worker.put([content])
    pins: set[str] = set()
    saver = Saver(worker, pins)
    calls = 0

    def hook() -> None:
        nonlocal calls
        calls += 1
        saver.advance(sum(call < calls for call in schedule))

    def pins_ended() -> bool:
        hook()
        if pins and pinned:
            saver.advance(STEPS)  # the collection waits for them
        return True

    hooked: Any = Hooked(service, root, hook)
    service.storage = hooked
    saver.advance(schedule.count(0))
    gc.collect(service, 0, pins_ended=pins_ended)
    saver.advance(STEPS)
    fresh = Vault(root, writer=False)
    assert load(fresh, fresh.manifest("training", RUN, "x")) == FILES
    gc.collect(fresh, 0)
    assert load(fresh, fresh.manifest("training", RUN, "x")) == FILES
    assert len(list(fresh.storage.keys(BLOBS))) == len(FILES)
    return calls


def schedules(root: Path, stored_before: bool) -> list[tuple[int, ...]]:
    """Return schedules of the steps of a save among the calls of a collection."""
    late = [1 << 30] * STEPS
    calls = interleave(root, late, stored_before=stored_before, pinned=True)
    assert calls > 3
    found = list(itertools.combinations_with_replacement(range(calls + 1), STEPS))
    return found[:: max(1, len(found) // 300)]


@pytest.fixture
def quick() -> Iterator[None]:
    """Skip fsync: these tests are about the order of calls, not about power cuts."""
    with mock.patch.object(os, "fsync"):
        yield


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stored_before", [True, False])
def test_no_interleaving_with_a_pinned_save_loses_a_file(
    tmp_path: Path, stored_before: bool
) -> None:
    tried = 0
    for schedule in schedules(tmp_path / "first", stored_before):
        interleave(tmp_path / f"{tried}", schedule, stored_before=stored_before, pinned=True)
        tried += 1
    assert tried > 50


def failures(tmp_path: Path, *, pinned: bool) -> int:
    """Return how many interleavings of a save and a collection fail."""
    failed = 0
    for number, schedule in enumerate(schedules(tmp_path / "first", True)):
        try:
            interleave(tmp_path / f"{number}", schedule, stored_before=True, pinned=pinned)
        except CheckpointDamaged:
            failed += 1
    return failed


@pytest.mark.usefixtures("quick")
def test_ignored_pins_are_noticed(tmp_path: Path) -> None:
    assert failures(tmp_path, pinned=False)


@pytest.mark.usefixtures("quick")
def test_ignored_journal_is_noticed(tmp_path: Path) -> None:
    with mock.patch.object(GcJournal, "note"):
        assert failures(tmp_path, pinned=True)


@pytest.mark.parametrize("call", range(1, 12))
def test_fork_during_a_collection_is_whole_or_refused(
    anywhere: Vault, tmp_path: Path, call: int
) -> None:
    first = save(anywhere, "x", FILES)
    anywhere.delete("training", RUN, "x")
    storage, calls = anywhere.storage, itertools.count(1)
    outcomes: list[str] = []

    def hook() -> None:
        if next(calls) == call:
            anywhere.storage = storage
            try:
                anywhere.commit(draft("y", first.files))
                outcomes.append("whole")
            except CheckpointDamaged:
                outcomes.append("refused")
            anywhere.storage = hooked

    hooked: Any = Hooked(anywhere, tmp_path, hook)
    anywhere.storage = hooked
    gc.collect(anywhere, 0)
    anywhere.storage = storage
    if outcomes == ["refused"]:
        with pytest.raises(CheckpointNotFound):
            anywhere.manifest("training", RUN, "y")
    elif outcomes:
        assert load(anywhere, anywhere.manifest("training", RUN, "y")) == FILES
    else:
        assert call > 5, "the collection made fewer calls"


def test_writer_without_a_ledger_pauses_collections(anywhere: Vault) -> None:
    with anywhere.gc_paused():
        refs = {"a": anywhere.put([FILES["a"]])}
        assert anywhere.is_gc_paused
        assert gc.collect(anywhere, 0) == []
        anywhere.commit(draft("x", refs))
    assert not anywhere.is_gc_paused
    assert gc.collect(anywhere, 0) == []
    assert load(anywhere, anywhere.manifest("training", RUN, "x")) == {"a": FILES["a"]}


def test_error_ends_the_pause(anywhere: Vault) -> None:
    with pytest.raises(RuntimeError), anywhere.gc_paused():
        anywhere.put([b"x"])
        raise RuntimeError
    assert [ref.size for ref in gc.collect(anywhere, 0)] == [1]


def test_pins_that_dont_end_postpone_the_collection(anywhere: Vault) -> None:
    anywhere.put([b"x"])
    assert gc.collect(anywhere, 0, pins_ended=lambda: False) == []
    assert len(gc.collect(anywhere, 0)) == 1


def test_stopped_collection_removes_nothing_more(anywhere: Vault) -> None:
    for content in (b"x", b"yy", b"zzz"):
        anywhere.put([content])
    answers = iter([False, True])
    assert len(gc.collect(anywhere, 0, stopping=lambda: next(answers))) == 1
    assert len(gc.collect(anywhere, 0)) == 2


def test_young_files_are_kept(anywhere: Vault) -> None:
    anywhere.put([b"x"])
    assert gc.unreferenced(anywhere) == gc.collect(anywhere) == []
    assert gc.unreferenced(anywhere, 0) == gc.collect(anywhere, 0)
    assert gc.unreferenced(anywhere, 0) == []


def test_unreferenced_files_can_exclude_checkpoints(anywhere: Vault) -> None:
    manifest = save(anywhere, "x", FILES)
    assert gc.unreferenced(anywhere, 0) == []
    files = gc.unreferenced(anywhere, 0, without={manifest.id})
    assert sorted(files, key=repr) == sorted(manifest.files.values(), key=repr)


def test_metadata_of_deleted_checkpoints_is_removed_unless_rewritten(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    manifest = save(vault, "x", FILES)
    vault.set_metadata(manifest, expires_at=None, public=True)
    vault.storage.delete("manifests/training/" + f"{RUN}/x.json")

    def write_metadata() -> bool:
        vault.set_metadata(manifest, expires_at=None, public=True)
        return True

    gc.collect(vault, 0, pins_ended=write_metadata)
    assert len(list(vault.storage.keys("marks/"))) == 1
    gc.collect(vault, 0)
    assert list(vault.storage.keys("marks/")) == []


def test_torn_line_of_the_journal_hides_no_key(tmp_path: Path) -> None:
    journal = GcJournal(tmp_path)
    with journal.begin() as reader:
        journal.note("blobs/aa/1")
        with (tmp_path / NAME).open("ab") as file:
            file.write(b"\nblobs/bb/2")  # its writer died
        with reader.deciding("blobs/bb/2") as noted:
            assert not noted
        journal.note("blobs/cc/3", "blobs/dd/4")
        for key in ("blobs/aa/1", "blobs/cc/3", "blobs/dd/4"):
            with reader.deciding(key) as noted:
                assert noted
    with journal.begin() as reader, reader.deciding("blobs/aa/1") as noted:
        assert not noted


def test_concurrent_saves_deletions_and_collections_lose_nothing(anywhere: Vault) -> None:
    faults: list[BaseException] = []
    saved = threading.Event()
    rounds = 30 if isinstance(anywhere.storage, LocalStorage) else 6
    collections = 0

    def saver(number: int) -> Iterator[None]:
        for step in range(rounds):
            files = {"own": b"%d" % number, "shared": b"shared", "step": b"%d" % (step % 3)}
            manifest = save(anywhere, f"n{number}", files, step=step, overwrite=True)
            assert load(anywhere, manifest) == files
            if step % 3 == 0:
                anywhere.delete("training", RUN, f"n{number}")
            yield

    def collector() -> Iterator[None]:
        nonlocal collections
        while not saved.is_set():
            gc.collect(anywhere, 0)
            collections += 1
            yield

    def run(work: Iterator[None]) -> None:
        try:
            for _ in work:
                pass
        except BaseException as error:  # noqa: BLE001  asserted below
            faults.append(error)

    savers = [threading.Thread(target=run, args=(saver(number),)) for number in range(3)]
    collectors = [threading.Thread(target=run, args=(collector(),)) for _ in range(2)]
    for thread in savers + collectors:
        thread.start()
    for thread in savers:
        thread.join()
    saved.set()
    for thread in collectors:
        thread.join()
    assert faults == []
    assert collections
    manifests = list(anywhere.manifests())
    assert manifests
    for manifest in manifests:
        load(anywhere, manifest)


WORKER = """
import sys
from pathlib import Path
from everstep.vault import Vault
from tests.vault.checkpoints import draft
vault = Vault(Path(sys.argv[1]))
for line in sys.stdin:
    number = int(line)
    with vault.writing():
        files = {"shared": vault.put([b"shared"]), "own": vault.put([b"%d" % (number % 4)])}
        vault.commit(draft(f"n{number % 3}", files, step=number), overwrite=True)
    print(number, flush=True)
"""


def test_worker_process_saves_during_the_services_collections(tmp_path: Path) -> None:
    vault = Vault(tmp_path, writer=False)
    root = Path(__file__).resolve().parents[2]
    pins: set[int] = set()
    ended = threading.Condition()
    removed: list[FileRef] = []
    collections = 0
    stop = threading.Event()

    def pins_ended() -> bool:
        with ended:
            before = set(pins)
            return ended.wait_for(lambda: not before & pins, timeout=60)

    def collect() -> None:
        nonlocal collections
        while not stop.is_set():
            removed.extend(gc.collect(vault, 0, pins_ended=pins_ended))
            collections += 1

    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        thread = threading.Thread(target=collect)
        thread.start()
        try:
            for number in range(100):
                with ended:
                    pins.add(number)
                worker.stdin.write(f"{number}\n")
                worker.stdin.flush()
                assert worker.stdout.readline() == f"{number}\n"
                with ended:
                    pins.discard(number)
                    ended.notify_all()
                manifest = vault.manifest("training", RUN, f"n{number % 3}")
                assert load(vault, manifest) == {"shared": b"shared", "own": b"%d" % (number % 4)}
        finally:
            stop.set()
            thread.join()
            worker.stdin.close()
    assert worker.returncode == 0
    assert removed, "each save leaves the file of an earlier one to collect"
    assert collections > 3
    gc.collect(vault, 0)
    named = {ref.blake3 for each in vault.manifests() for ref in each.files.values()}
    assert set(vault.storage.keys(BLOBS)) == {blob_key(digest) for digest in named}
