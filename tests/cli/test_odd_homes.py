"""Homes whose paths hold characters that mean something in URLs, globs, shells and formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.engine import Model
from everstep.ledger.sqlite import database
from everstep.ledger.sqlite.database import open_engine, open_read_only
from tests.runtime.local import Local, pico
from tests.vault.homes import Home

__all__ = ["pico"]
NAMES = [
    "x?",
    "x?mode=memory&cache=shared",
    "a#b",
    "50%",
    "%(home)s",
    "%2e%2e",
    "a b",
    "[ab]*",
    "$(id);'\"`&|<>\\",
    "two\nlines",
    "[red]漢é",
    ":memory:",
    "-x",
    "file:x",
    "tinker:",
]


def call(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", NAMES)
def test_database_lies_where_its_path_says(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "ledger.sqlite"
    path.parent.mkdir()
    open_engine(path).dispose()
    open_read_only(path).dispose()
    assert {each.name for each in tmp_path.iterdir()} == {name}
    assert path.stat().st_size > 0


def test_installation_may_lie_below_a_percent_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "__file__", "/50%/%(x)s/ledger/sqlite/database.py")
    location = database._config().get_main_option("script_location")
    assert location == "/50%/%(x)s/ledger/migrations"


@pytest.mark.parametrize("name", NAMES)
def test_home_is_backed_up_restored_verified_and_rebuilt(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    home = Home(tmp_path / name / "home")
    home.save("x", b"content of x")
    backups, restored = tmp_path / name / "backups", tmp_path / name / "restored"
    call("backup", backups, "--home", home.path)
    call("restore", backups, "--home", restored)
    assert "intact" in call("ledger", "verify", "--home", restored)
    (restored / "ledger.sqlite").unlink()
    (restored / "ledger.sqlite.position").unlink(missing_ok=True)
    assert "1 checkpoint and 1 run restored" in call("vault", "rebuild", "--home", restored)
    call("vault", "verify", "--home", restored)
    assert {each.name for each in tmp_path.iterdir()} == {name}


def test_run_survives_a_restart_in_an_odd_home(tmp_path: Path, pico: Model) -> None:
    home = tmp_path / "".join(each for each in NAMES if each != "x?mode=memory&cache=shared")
    with Local(home, pico).killed() as first:
        run = first.new_run()
        first.train(run, 1)
        path = first.do(run, "save_weights", path="one")["path"]
    with first.after() as second:
        second.train(run, 2)
        assert second.http.get("checkpoints").json()["checkpoints"][0]["tinker_path"] == path
    assert {each.name for each in tmp_path.iterdir()} == {home.name}
