"""Help, version and start-up of the ``everstep`` command."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import everstep
from everstep.cli.app import app
from everstep.cli.common.extras import OPTIONAL_PACKAGES, SERVER_PACKAGES

COMMAND = [sys.executable, "-m", "everstep"]
HEAVY = {"fastapi", "httpx", "numpy", "pydantic", "rich", "sqlalchemy", "structlog", "torch"}
WIDTH = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command and group, with the words that are typed for it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
LEAVES = [path for path, command in COMMANDS.items() if not hasattr(command, "commands")]


def test_walk_finds_commands_of_all_groups() -> None:
    assert {("train",), ("checkpoint", "export"), ("vault", "gc")} <= COMMANDS.keys()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_summary_is_a_sentence_that_fits_its_line(path: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*path, "-h"], env=WIDTH)
    assert done.exit_code == 0
    summary = COMMANDS[path].help.split("\n\n")[0]
    assert summary.endswith(".") and summary[0].isupper()
    assert " ".join(summary.split()) in " ".join(done.output.split())
    assert "..." not in done.output.partition("\nCommands:")[2]


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_option_and_argument_has_help(path: tuple[str, ...]) -> None:
    options = [each for each in COMMANDS[path].params if not each.hidden]
    assert options
    assert [each.name for each in options if not each.help] == []


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_imports_no_heavy_package(flag: str) -> None:
    script = f"""
import sys
sys.argv = ["everstep", {flag!r}]
from everstep.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 0, end.code
loaded = {HEAVY!r} & {{name.partition(".")[0] for name in sys.modules}}
assert "everstep.cli.app" in sys.modules
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: everstep" in done.stdout


def test_version_is_printed_by_the_module_and_by_the_option() -> None:
    done = subprocess.run(
        [*COMMAND, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"everstep {everstep.__version__}\n")


# A package that hides others, as if they were not installed.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
sys.argv = {words!r}
from everstep.cli import main
main()
"""


def run_without(hidden: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as if some packages were not installed."""
    script = HIDE.format(
        hidden=tuple(name.replace("-", "_") for name in hidden), words=["everstep", *words]
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "EVERSTEP_HOME": "/nonexistent"},
    )


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        (SERVER_PACKAGES, ()),
        (SERVER_PACKAGES, ("serve",)),
        (SERVER_PACKAGES, ("--version",)),
        (tuple(name for name in SERVER_PACKAGES if name not in ("typer", "rich")), ("serve",)),
        (("torch", "transformers", "fastapi"), ("serve",)),
        (("pydantic-settings",), ("serve",)),
    ],
)
def test_missing_server_extra_is_reported_with_the_command_that_installs_it(
    hidden: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = run_without(hidden, *words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "which is not installed" in line and 'pip install "everstep[server]"' in line
    assert "import everstep as tinker" in line, "what works without it"
    assert " ".join(["'everstep", *words]) in line


def test_other_missing_modules_are_not_blamed_on_the_server_extra() -> None:
    done = run_without(("pydantic",), "serve")
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr
    assert "everstep[server]" not in done.stderr


def test_packages_of_the_server_extra_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["server"]
    names = {each.partition(">")[0].partition("=")[0].strip() for each in extra}
    assert names == {*SERVER_PACKAGES, *OPTIONAL_PACKAGES}
    some = {each.partition(">")[0] for each in extra if ";" in each}
    assert some == set(OPTIONAL_PACKAGES), "installed on some platforms, so never required"
