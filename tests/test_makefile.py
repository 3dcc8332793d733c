"""The Makefile's targets: the commands that they would run on a fresh machine and a second time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLDEST = "0.6.3"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
SDKS = "tests/interop/official_sdks.txt"
FILES = ("Makefile", "pyproject.toml", "constraints.txt", SDKS, "tests/interop/cookbook.txt")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(where: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", *arguments], cwd=where, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def installed(where: Path, *stamps: str) -> None:
    """Make a tree look installed, with its stamps in this order."""
    (where / ".venv" / "bin").mkdir(parents=True)
    (where / ".venv" / "bin" / "pip").touch()
    for each in (*(where / SDKS).read_text().split(), "cookbook"):
        (where / ".venv" / "sdks" / each).mkdir(parents=True)
    for moment, stamp in enumerate((*stamps, "sdks/cookbook")):
        path = where / ".venv" / stamp
        if not path.exists():
            path.touch()
        os.utime(path, (2e9 + moment, 2e9 + moment))


def test_every_target_is_described(clone: Path) -> None:
    text = (clone / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    described = dict(re.findall(r"^  make (\S+) +(\S.*)$", make(clone), re.MULTILINE))
    assert sorted(described) == sorted(phony.split())
    assert all(len(words) > 15 for words in described.values())


@pytest.mark.parametrize(
    ("target", "extra", "last"),
    [("quickstart", "[server]", "everstep quickstart"), ("test", "[test]", "-m pytest")],
)
def test_fresh_machine_installs_everything_in_order(
    clone: Path, target: str, extra: str, last: str
) -> None:
    planned = make(clone, "-n", target)
    order = [
        *("==> creating .venv", "-m venv .venv"),
        *("==> installing torch", "-c constraints.txt", "torch==2.13.0"),
        *("==> installing everstep", f'-c constraints.txt -e ".{extra}"'),
        *([f"==> installing tinker {OLDEST}"] if target == "test" else []),
        last,
    ]
    positions = [planned.index(each) for each in order]
    assert positions == sorted(positions), planned


def test_torch_build_can_be_chosen(clone: Path) -> None:
    planned = make(clone, "-n", "quickstart", "TORCH=torch==9 --index-url https://somewhere")
    assert "-c constraints.txt torch==9 --index-url https://somewhere" in planned
    assert "+cpu" not in planned


@pytest.mark.parametrize(
    ("target", "runs"),
    [("quickstart", ".venv/bin/everstep quickstart"), ("test", ".venv/bin/python -m pytest")],
)
def test_second_run_installs_nothing(clone: Path, target: str, runs: str) -> None:
    installed(clone, ".torch", ".server", ".test")
    planned = make(clone, "-n", target)
    assert runs in planned
    assert "install" not in planned


def test_ci_runs_make_test() -> None:
    *before, last = (ROOT / ".ci" / "run").read_text().splitlines()
    assert re.fullmatch(r"exec .*python3 \.ci/bounded\.py \d+ make test", last)
    assert not re.search(r"\b(make|pytest|ruff|mypy)\b", "\n".join(before))
