"""Whole directory: an exported directory is complete or absent."""

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


def test_content_appears_at_once(tmp_path: Path) -> None:
    target = tmp_path / "a/b"
    with whole_directory(target) as stage:
        (stage / "inner").mkdir()
        (stage / "inner/file").write_text("content")
        assert not target.exists()
    assert (target / "inner/file").read_text() == "content"
    assert [each.name for each in target.parent.iterdir()] == ["b"]


def test_only_an_empty_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_directory(tmp_path / "out") as stage:
        (stage / "file").write_text("first")
    with pytest.raises(VaultError, match="not empty"), whole_directory(tmp_path / "out"):
        pytest.fail("whole_directory yielded a non-empty target")
    assert (tmp_path / "out/file").read_text() == "first"


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "out") as stage:
        (stage / "half").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_sigkill_leaves_no_target_and_the_next_attempt_starts_empty(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with whole_directory(tmp_path / "out") as stage:
        (stage / "file").write_text("whole")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["file"]


def test_second_writer_is_rejected(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "out") as stage:
        (stage / "file").write_text("mine")
        with pytest.raises(VaultBusy), whole_directory(tmp_path / "out"):
            pytest.fail("whole_directory yielded twice at once")
        assert (stage / "file").exists()
    assert (tmp_path / "out/file").read_text() == "mine"
