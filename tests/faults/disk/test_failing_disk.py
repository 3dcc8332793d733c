"""Failing disk: one system call after the other fails.

The operation fails with a clear error, later ones work, and no acknowledged work is lost.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from everstep.failpoints import VARIABLE
from everstep.ledger import Ledger
from everstep.testing import faulty
from everstep.testing.history import History, Reporter
from everstep.testing.invariants import LEDGER, check_vault, find_in_ledger
from everstep.testing.nursery import Nursery
from everstep.testing.workload import Step, run_steps
from everstep.vault import DiskFull, Vault
from tests.faults.disk import ledger_program

PROGRAM: list[Step] = [
    ("save", "x", b"a" * 100),
    ("save", "y", b"b" * 9000),
    ("save", "x", b"c" * 3000),
    ("collect", "", b""),
    ("delete", "y", b""),
    ("collect", "", b""),
    ("fork", "z", b""),
]
CALLS = [name for name in faulty.CHANGES if name != "rmdir"]
STRACE = shutil.which("strace")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", CALLS)
def test_failure_of_any_call_keeps_acknowledged_work(tmp_path: Path, name: str, code: int) -> None:
    fired = 0
    for nth in itertools.count(1):
        root = tmp_path / str(nth)
        root.mkdir()
        history, failing = program_on(root, name, nth, code)
        if not failing.fired:
            break
        fired += 1
        assert failing.tried_again == []
        wrong, _ = check_vault(root / "vault", history)
        assert wrong == [], (nth, failing.path)
    assert fired or name == "rename"


def program_on(root: Path, name: str, nth: int, code: int) -> tuple[History, faulty.Failing]:
    """Run the program, retrying each step that fails."""
    lines: list[bytes] = []
    reporter = Reporter(lines.append)
    with faulty.failing(root, name, nth, code) as failing:
        try:
            vault = Vault(root / "vault")
        except OSError:
            vault = Vault(root / "vault")
        for number, step in enumerate(PROGRAM):
            before = failing.fired
            try:
                run_steps(vault, [step], reporter, first=number)
            except OSError as error:
                assert error.errno == code
                assert isinstance(error, DiskFull) or code != errno.ENOSPC or step[0] != "save"
                if name != "unlink":  # a failed unlink leaves the temporary file
                    assert list((root / "vault/tmp").iterdir()) == []
                run_steps(vault, [step], reporter, first=number)
            else:  # mkdir of an existing directory may fail
                assert failing.fired == before or name == "mkdir", "the failure was not reported"
    history = History()
    history.feed(lines)
    return history, failing


def test_retried_fsync_is_detected(tmp_path: Path) -> None:
    with faulty.failing(tmp_path, "fsync", 1, errno.EIO) as failing:
        handle = os.open(tmp_path / "a", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError, match="was to fail"):
            os.fsync(handle)
        os.fsync(handle)
        os.close(handle)
    assert failing.tried_again == [tmp_path / "a"]


# The ledger: system calls of SQLite


def judge(home: Path, history: History) -> None:
    """Check that acknowledged operations exist, some failed, and the last one was accepted."""
    found = asyncio.run(find_in_ledger(home / LEDGER))
    assert history.judge(found) == []
    assert history.failures, "nothing failed"
    assert [each for each in history.failures if "NotWritten" not in each] == []
    assert history.done
    last = max(history.known, key=lambda thing: int(thing.rpartition("/")[2]))
    assert last.endswith(f"/{ledger_program.OPERATIONS - 1}"), "later operations failed"


def prepared(home: Path) -> Path:
    """Create a home with an empty ledger."""
    home.mkdir()

    async def open_and_close() -> None:
        await (await Ledger.open(home / LEDGER)).close()

    asyncio.run(open_and_close())
    return home


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="there is no strace")
@pytest.mark.parametrize("nth", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("calls", "error"),
    [("fsync,fdatasync", "EIO"), ("pwrite64", "EIO"), ("pwrite64", "ENOSPC")],
)
def test_failure_of_a_call_of_sqlite_keeps_acknowledged_work(
    tmp_path: Path, calls: str, error: str, nth: int
) -> None:
    home = prepared(tmp_path / "home")
    inject = f"inject={calls}:error={error}:when={nth}"
    log = str(home / f"{LEDGER}-wal")
    strace = [str(STRACE), "-f", "-qq", "-o", "/dev/null", "-P", log]
    strace += ["-e", f"trace={calls}", "-e", inject]
    program = [sys.executable, "-m", ledger_program.__name__, str(home)]
    finished = subprocess.run([*strace, *program], stdout=subprocess.PIPE, check=True)
    history = History()
    history.feed(finished.stdout.splitlines())
    judge(home, history)


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="there is no strace")
def test_slow_disk_delays_acknowledgements_and_fails_nothing(tmp_path: Path) -> None:
    home = prepared(tmp_path / "home")
    syncs = "fsync,fdatasync"
    strace = [str(STRACE), "-f", "-qq", "-o", "/dev/null", "-e", f"trace={syncs}"]
    strace += ["-e", f"inject={syncs}:delay_enter=100000"]  # µs
    program = [sys.executable, "-m", ledger_program.__name__, str(home)]
    start = time.monotonic()
    finished = subprocess.run([*strace, *program], stdout=subprocess.PIPE, check=True)
    assert time.monotonic() - start > 0.1 * ledger_program.OPERATIONS, (
        "an operation was acknowledged before its fsync"
    )
    history = History()
    history.feed(finished.stdout.splitlines())
    assert history.failures == []
    assert history.acknowledged == ledger_program.OPERATIONS
    assert history.judge(asyncio.run(find_in_ledger(home / LEDGER))) == []


@pytest.mark.slow
def test_failing_commit_keeps_acknowledged_work(tmp_path: Path, nursery: Nursery) -> None:
    for nth in (1, 2, 3):
        home = prepared(tmp_path / str(nth))
        environment = {VARIABLE: f"ledger.commit.written=error:EIO@{nth}"}
        arguments: dict[str, Any] = {"home": str(home)}
        target = f"{ledger_program.__name__}:live"
        child = nursery.start(target, arguments, environment=environment)
        history = History()
        while not child.ended:
            history.feed(child.lines())
        child.close()
        judge(home, history)
