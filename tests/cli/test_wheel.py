"""The wheel in a clean environment, without the ``server`` extra."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import everstep

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*words: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program without the variables that make other packages importable."""
    done = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and the one package that its import needs."""
    directory = tmp_path_factory.mktemp("wheel")
    dist, clean = directory / "dist", directory / "clean"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist, cwd=ROOT)
    (wheel,) = dist.glob("*.whl")
    assert everstep.__version__ in wheel.name
    run(sys.executable, "-m", "venv", "--without-pip", clean, cwd=directory)
    pip = (sys.executable, "-m", "pip", "--python", clean / "bin" / "python", "install")
    run(*pip, "--no-deps", "--no-index", "--quiet", wheel, cwd=directory)
    (packages,) = clean.glob("lib/*/site-packages")
    spec = find_spec("lazy_loader")
    assert spec is not None and spec.submodule_search_locations
    (source,) = spec.submodule_search_locations
    shutil.copytree(source, packages / "lazy_loader")
    return clean / "bin"


@pytest.mark.parametrize("words", [(), ("serve",), ("checkpoint", "list")], ids=" ".join)
def test_command_of_a_bare_wheel_says_how_to_install_the_server_extra(
    environment: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    for program in ([environment / "everstep"], [environment / "python", "-m", "everstep"]):
        done = run(*program, *words, cwd=tmp_path, code=2)
        (line,) = done.stderr.splitlines()
        assert "needs typer, which is not installed" in line
        assert 'pip install "everstep[server]"' in line, "how to get the commands"
        assert "import everstep as tinker" in line, "what the client does without them"


def test_bare_wheel_knows_its_version(environment: Path, tmp_path: Path) -> None:
    script = "import everstep; print(everstep.__version__)"
    done = run(environment / "python", "-c", script, cwd=tmp_path)
    assert done.stdout.strip() == everstep.__version__
