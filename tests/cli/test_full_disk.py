"""Commands that write files onto a disk that is full: a clear word, and nothing half-written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import everstep
from everstep.cli import app
from everstep.testing.crashfs import CrashFS, scratch
from everstep.testing.devices import why_not
from tests.conftest import Service
from tests.scenario import MODEL, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
ROOM = 40_000
"""Bytes that are left: the first file fits, the next one doesn't."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Of these tests alone: a backup has everything only where nothing is damaged."""
    running = Service(tmp_path_factory.mktemp("service") / "home")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def path(service: Service) -> str:
    with everstep.ServiceClient(base_url=service.url, api_key="tml-test") as client:
        run = client.create_lora_training_client(MODEL, 8, 1).result()
        train(everstep, run, 1)
        return str(run.save_state("large").result().path)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk with hardly any room, until its file ``filler`` is removed."""
    with CrashFS(scratch()) as disk:
        with pytest.raises(OSError, match="No space left"), (disk.root / "filler").open("wb") as to:
            while True:
                to.write(bytes(4096))
        with (disk.root / "filler").open("r+b") as filler:
            filler.truncate(filler.seek(0, 2) - ROOM)
        yield disk.root


def typed(home: Path, *words: object) -> Result:
    env = {"EVERSTEP_HOME": str(home), "TERM": "dumb", "COLUMNS": "300"}
    return CliRunner().invoke(app, [*map(str, words)], env=env)


def left_on(disk: Path) -> list[str]:
    kept = {"filler", "lost+found"}
    return [str(each.relative_to(disk)) for each in disk.rglob("*") if each.name not in kept]


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_an_export_is_whole_or_absent(service: Service, path: str, disk: Path, form: str) -> None:
    command = ("checkpoint", "export", path, disk / "out", "--format", form)
    done = typed(service.home, *command)
    assert done.exit_code == 1
    assert f"no room left for {disk}" in done.stderr
    assert left_on(disk) == []
    (disk / "filler").unlink()
    assert typed(service.home, *command).exit_code == 0
    assert (disk / "out" / "README.md").stat().st_size > 0


def test_a_download_goes_on_when_there_is_room(service: Service, path: str, disk: Path) -> None:
    command = ("checkpoint", "download", path, "--output", disk / "out")
    done = typed(service.home, *command)
    assert done.exit_code == 1
    assert f"no room left for {disk / 'out'}" in done.stderr
    assert all(".part" in each for each in left_on(disk) if each != "out")
    (disk / "filler").unlink()
    assert typed(service.home, *command).exit_code == 0
    assert not [each for each in left_on(disk) if ".part" in each]


def test_a_backup_leaves_the_room_that_it_found(service: Service, path: str, disk: Path) -> None:
    done = typed(service.home, "backup", disk / "out")
    assert done.exit_code == 1
    assert str(disk / "out") in done.stderr
    assert [each for each in (disk / "out").rglob("*") if each.is_file()] == []
    (disk / "filler").unlink()
    assert typed(service.home, "backup", disk / "out").exit_code == 0


def test_what_does_not_fit_is_not_restored(
    service: Service, path: str, disk: Path, tmp_path: Path
) -> None:
    assert typed(service.home, "backup", tmp_path / "kept").exit_code == 0
    command = ("restore", tmp_path / "kept", "--home", disk / "home")
    done = typed(service.home, *command)
    assert done.exit_code == 1
    assert f"{disk}/.home.restoring" in done.stderr
    assert left_on(disk) == []
    (disk / "filler").unlink()
    assert typed(service.home, *command).exit_code == 0
