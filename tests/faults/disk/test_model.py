"""The same invariants on a model of a file system: anywhere, without root, in a blink."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.testing import faulty
from everstep.testing.history import History, Reporter, Violation
from everstep.testing.invariants import check_vault
from everstep.testing.memoryfs import Crash, Log, Recorded
from everstep.testing.modelstore import ModelStore
from everstep.testing.strategies import crashes, steps
from everstep.testing.workload import Step, run_steps
from everstep.vault import Vault

PROGRAM: list[Step] = [
    ("save", "x", b"a" * 100),
    ("save", "y", b"shared"),
    ("save", "x", b"b" * 3000),
    ("collect", "", b""),
    ("fork", "z", b""),
    ("delete", "y", b""),
    ("collect", "", b""),
]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="everstep-model-") as name:
        yield Path(name)


def record(program: list[Step], forget: faulty.Sort | None = None) -> Log:
    with scratch() as root, Recorded(root) as log, contextlib.ExitStack() as stack:
        if forget is not None:
            stack.enter_context(faulty.without_fsync(forget))
        run_steps(Vault(root / "vault"), program, Reporter(log.mark))
    return log


def judged(log: Log, crash: Crash) -> list[Violation]:
    history = History()
    history.feed(log.said(crash.position))
    with scratch() as root:
        crash.write(root)
        return check_vault(root / "vault", history)[0]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), program=steps())
def test_any_program_any_crash(data: st.DataObject, program: list[Step]) -> None:
    log = record(program)
    for _ in range(5):
        assert judged(log, data.draw(crashes(log))) == []


@settings(deadline=None, max_examples=25)
@given(program=steps())
def test_where_nothing_crashes_the_vault_is_the_model_store(program: list[Step]) -> None:
    model = ModelStore()
    with scratch() as root:
        vault = Vault(root / "vault")
        for number, step in enumerate(program):
            run_steps(vault, [step], Reporter(lambda _: None), first=number)
            model.apply(step)
            held = {each.name: bytes(vault.read(each, "adapter")) for each in vault.manifests()}
            assert held == model.held


def test_a_crash_at_every_call() -> None:
    log = record(PROGRAM)
    chance = random.Random(3)
    for position in range(len(log.entries) + 1):
        for ordered in (True, False, False):
            crash = log.crash(position, chance, ordered=ordered)
            assert judged(log, crash) == [], position


@pytest.mark.parametrize("sort", ["files", "directories"])
def test_a_forgotten_fsync_is_noticed(sort: faulty.Sort) -> None:
    log = record(PROGRAM, forget=sort)
    chance = random.Random(4)
    crashes = [log.crash(len(log.entries), chance) for _ in range(20)]
    assert sum(bool(judged(log, each)) for each in crashes) > 10


def test_any_one_fsync_of_a_save_that_is_forgotten_is_noticed() -> None:
    """But for those that are made good: the same directory is synced once more before the end."""
    made_good, noticed = [], []
    for nth in itertools.count(1):
        with scratch() as root, Recorded(root) as log, faulty.without_fsync(nth) as synced:
            run_steps(Vault(root / "vault"), PROGRAM[:1], Reporter(log.mark))
        if nth > len(synced):
            break
        forgotten = synced[nth - 1]
        chance = random.Random(4)
        lost = any(judged(log, log.crash(len(log.entries), chance)) for _ in range(40))
        assert lost == (forgotten not in synced[nth:]), forgotten.relative_to(root)
        (noticed if lost else made_good).append(forgotten.relative_to(root))
    assert len(made_good) <= 3
    assert sum(each.parent.name == "tmp" for each in noticed) == 3, "two files and the manifest"
    assert len(noticed) >= 11


def test_a_vault_in_a_directory_that_someone_made() -> None:
    """The directory's own name becomes durable with what is saved in it."""
    with scratch() as root, Recorded(root) as log:
        (root / "vault").mkdir()
        run_steps(Vault(root / "vault"), PROGRAM[:1], Reporter(log.mark))
    chance = random.Random(5)
    for _ in range(20):
        assert judged(log, log.crash(len(log.entries), chance)) == []


# The model says what file systems do


def ends(work: str) -> list[dict[str, bytes]]:
    """All that a power cut may leave after lines of Python that use ``root``."""
    with scratch() as root, Recorded(root) as log:
        exec(work, {"root": root, "os": os, "sync": _sync})
    chance = random.Random(6)
    found: list[dict[str, bytes]] = []
    for _ in range(200):
        files = log.crash(len(log.entries), chance).files
        if files not in found:
            found.append(files)
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


OVERWRITE = """
(root / "a").write_bytes(b"old"); sync(root / "a"); sync(root)
(root / "t").write_bytes(b"new")
"""


def test_what_is_not_synced_may_be_anything() -> None:
    found = ends("(root / 'a').write_bytes(b'abc'); sync(root)")
    assert {"a": b"abc"} in found
    assert {"a": b""} in found
    assert {"a": b"\0\0\0"} in found
    assert {} not in found


def test_a_rename_without_fsync_of_the_file_destroys_both() -> None:
    found = ends(OVERWRITE + "(root / 't').replace(root / 'a'); sync(root)")
    assert {"a": b"\0\0\0"} in found
    assert {"a": b"old"} not in found


def test_a_rename_without_fsync_of_the_directory_may_not_have_happened() -> None:
    found = ends(OVERWRITE + "sync(root / 't'); (root / 't').replace(root / 'a')")
    assert any(files.get("a") == b"old" for files in found)
    assert any(files.get("a") == b"new" for files in found)
    assert all(files.get("a") in (b"old", b"new") for files in found)


def test_with_both_there_is_one_end() -> None:
    whole = OVERWRITE + "sync(root / 't'); (root / 't').replace(root / 'a'); sync(root)"
    assert ends(whole) == [{"a": b"new"}]


def test_names_in_a_directory_that_is_not_durable_are_gone() -> None:
    lines = "(root / 'd').mkdir(); (root / 'd/a').write_bytes(b'a'); sync(root / 'd/a')"
    assert {} in ends(lines + "; sync(root / 'd')")
    assert ends(lines + "; sync(root / 'd'); sync(root)") == [{"d/a": b"a"}]
