"""Model file system: the vault's invariants after any crash, without root."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.testing import faulty
from everstep.testing.history import History, Reporter, Violation
from everstep.testing.invariants import check_vault
from everstep.testing.memoryfs import Crash, Log, Recorded
from everstep.testing.modelstore import ModelStore
from everstep.testing.strategies import crashes, steps
from everstep.testing.workload import Step, run_steps
from everstep.vault import Vault
from everstep.vault.storage import local
from tests.profiles import example_count

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


@example_count(60)
@given(data=st.data(), program=steps())
def test_vault_survives_any_crash_of_any_program(data: st.DataObject, program: list[Step]) -> None:
    log = record(program)
    for _ in range(5):
        assert judged(log, data.draw(crashes(log))) == []


@example_count(25)
@given(program=steps())
def test_vault_equals_the_model_store_without_a_crash(program: list[Step]) -> None:
    model = ModelStore()
    with scratch() as root:
        vault = Vault(root / "vault")
        for number, step in enumerate(program):
            run_steps(vault, [step], Reporter(lambda _: None), first=number)
            model.apply(step)
            held = {each.name: bytes(vault.read(each, "adapter")) for each in vault.manifests()}
            assert held == model.held


def test_vault_survives_a_crash_at_every_call() -> None:
    log = record(PROGRAM)
    assert len(log.entries) > 50
    chance = random.Random(3)
    for position in range(len(log.entries) + 1):
        for ordered in (True, False, False):
            crash = log.crash(position, chance, ordered=ordered)
            assert judged(log, crash) == [], position


@pytest.mark.parametrize("sort", ["files", "directories"])
def test_forgotten_fsync_is_detected(sort: faulty.Sort) -> None:
    log = record(PROGRAM, forget=sort)
    chance = random.Random(4)
    crashes = [log.crash(len(log.entries), chance) for _ in range(20)]
    assert sum(bool(judged(log, each)) for each in crashes) > 10


def test_any_single_forgotten_fsync_of_a_save_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten fsync is harmless only if the same directory is synced again before the end.

    Those that are made at once are made in order here, so that each is forgotten in one trial.
    """
    monkeypatch.setattr(local, "_at_once", lambda calls: [call() for call in calls])
    made_good: list[Path] = []
    detected: list[Path] = []
    for nth in itertools.count(1):
        with scratch() as root, Recorded(root) as log, faulty.without_fsync(nth) as synced:
            run_steps(Vault(root / "vault"), PROGRAM[:1], Reporter(log.mark))
        if nth > len(synced):
            break
        forgotten = synced[nth - 1]
        chance = random.Random(4)
        lost = any(judged(log, log.crash(len(log.entries), chance)) for _ in range(40))
        assert lost == (forgotten not in synced[nth:]), forgotten.relative_to(root)
        (detected if lost else made_good).append(forgotten.relative_to(root))
    assert len(made_good) <= 3
    assert sum(each.parent.name == "tmp" for each in detected) == 3, "two files and the manifest"
    assert len(detected) >= 11


def test_vault_in_an_existing_directory_is_durable() -> None:
    """The directory's own name becomes durable with the first save."""
    with scratch() as root, Recorded(root) as log:
        (root / "vault").mkdir()
        run_steps(Vault(root / "vault"), PROGRAM[:1], Reporter(log.mark))
    assert log.said(len(log.entries))
    chance = random.Random(5)
    for _ in range(20):
        assert judged(log, log.crash(len(log.entries), chance)) == []


# The model itself


def ends(work: str) -> list[dict[str, bytes]]:
    """Return the states that a power cut may leave after lines of Python that use ``root``."""
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


def test_unsynced_bytes_may_be_lost_or_zero() -> None:
    found = ends("(root / 'a').write_bytes(b'abc'); sync(root)")
    assert {"a": b"abc"} in found
    assert {"a": b""} in found
    assert {"a": b"\0\0\0"} in found
    assert {} not in found


def test_rename_without_fsync_of_the_file_may_lose_both_contents() -> None:
    found = ends(OVERWRITE + "(root / 't').replace(root / 'a'); sync(root)")
    assert {"a": b"\0\0\0"} in found
    assert {"a": b"old"} not in found


def test_rename_without_fsync_of_the_directory_may_be_lost() -> None:
    found = ends(OVERWRITE + "sync(root / 't'); (root / 't').replace(root / 'a')")
    assert any(files.get("a") == b"old" for files in found)
    assert any(files.get("a") == b"new" for files in found)
    assert all(files.get("a") in (b"old", b"new") for files in found)


def test_rename_with_both_fsyncs_has_one_outcome() -> None:
    whole = OVERWRITE + "sync(root / 't'); (root / 't').replace(root / 'a'); sync(root)"
    assert ends(whole) == [{"a": b"new"}]


def test_names_in_an_unsynced_directory_may_be_lost() -> None:
    lines = "(root / 'd').mkdir(); (root / 'd/a').write_bytes(b'a'); sync(root / 'd/a')"
    assert {} in ends(lines + "; sync(root / 'd')")
    assert ends(lines + "; sync(root / 'd'); sync(root)") == [{"d/a": b"a"}]
