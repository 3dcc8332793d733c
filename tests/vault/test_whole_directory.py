"""A directory that is exported is whole, or not there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.vault import VaultBusy, VaultError
from everstep.vault.export import whole_directory

KILLED = """
import os, pathlib, signal, sys
from everstep.vault.export import whole_directory
with whole_directory(pathlib.Path(sys.argv[1])) as stage:
    (stage / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_is_written_appears_at_once(tmp_path: Path) -> None:
    target = tmp_path / "a/b"
    with whole_directory(target) as stage:
        (stage / "inner").mkdir()
        (stage / "inner/file").write_text("content")
        assert not target.exists()
    assert (target / "inner/file").read_text() == "content"
    assert [each.name for each in target.parent.iterdir()] == ["b"]


def test_an_empty_directory_gives_way_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_directory(tmp_path / "out") as stage:
        (stage / "file").write_text("first")
    with pytest.raises(VaultError, match="not empty"), whole_directory(tmp_path / "out"):
        pytest.fail("it was given something to write into")
    assert (tmp_path / "out/file").read_text() == "first"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "out") as stage:
        (stage / "half").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_after_sigkill_there_is_nothing_and_the_next_attempt_begins_anew(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with whole_directory(tmp_path / "out") as stage:
        (stage / "file").write_text("whole")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["file"]


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "out") as stage:
        (stage / "file").write_text("mine")
        with pytest.raises(VaultBusy), whole_directory(tmp_path / "out"):
            pytest.fail("it was given what another writes")
        assert (stage / "file").exists()
    assert (tmp_path / "out/file").read_text() == "mine"
