"""Commands that write files to a full disk: a clear error, and no partial result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx
import pytest
from typer.testing import CliRunner, Result

import everstep
from everstep.cli.app import app
from everstep.testing.crashfs import CrashFS, scratch
from everstep.testing.devices import why_not
from tests.conftest import Service
from tests.scenario import MODEL, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
FREE_BYTES = 40_000
"""Free bytes: the first file fits, the next one doesn't."""
NETWORK_READ_BYTES = 64 << 10
"""The client writes what it reads from the connection at a time, up to this."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of these tests alone: a backup is complete only if nothing is damaged."""
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
    """A disk with little free space, until its file ``filler`` is removed."""
    with CrashFS(scratch()) as disk:
        with pytest.raises(OSError, match="No space left"), (disk.root / "filler").open("wb") as to:
            while True:
                to.write(bytes(4096))
        free(disk.root, FREE_BYTES)
        yield disk.root


def free(disk: Path, size: int) -> None:
    """Free some bytes of a disk's filler."""
    with (disk / "filler").open("r+b") as filler:
        filler.truncate(filler.seek(0, 2) - size)


def invoke(home: Path, *words: object) -> Result:
    env = {"EVERSTEP_HOME": str(home), "TERM": "dumb", "COLUMNS": "300"}
    return CliRunner().invoke(app, [*map(str, words)], env=env)


def left_on(disk: Path) -> list[str]:
    kept = {"filler", "lost+found"}
    return [str(each.relative_to(disk)) for each in disk.rglob("*") if each.name not in kept]


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_export_on_full_disk_is_complete_or_absent(
    service: Service, path: str, disk: Path, form: str
) -> None:
    command = ("checkpoint", "export", path, disk / "out", "--format", form)
    done = invoke(service.home, *command)
    assert done.exit_code == 1
    assert f"no disk space left for {disk}" in done.stderr
    assert left_on(disk) == []
    (disk / "filler").unlink()
    assert invoke(service.home, *command).exit_code == 0
    assert (disk / "out" / "README.md").stat().st_size > 0


def test_download_resumes_after_full_disk(service: Service, path: str, disk: Path) -> None:
    command = ("checkpoint", "download", path, "--output", disk / "out")
    free(disk, 2 * NETWORK_READ_BYTES)
    done = invoke(service.home, *command)
    assert done.exit_code == 1
    assert f"no disk space left for {disk / 'out'}" in done.stderr
    unfinished = [each for each in left_on(disk) if each != "out"]
    assert unfinished and all(".part" in each for each in unfinished)
    (partial,) = (disk / "out").rglob("checkpoint.tar")
    size = partial.stat().st_size
    assert size > 0
    (disk / "filler").unlink()
    receive, ranges = httpx.Response.iter_raw, []

    def record_range(self: httpx.Response, chunk: int | None = None) -> Iterator[bytes]:
        if not isinstance(self.stream, httpx.ByteStream):  # else it was read as a whole
            ranges.append(self.request.headers.get("range"))
        yield from receive(self, chunk)

    with mock.patch.object(httpx.Response, "iter_raw", record_range):
        assert invoke(service.home, *command).exit_code == 0
    assert ranges == [f"bytes={size}-"]
    assert not [each for each in left_on(disk) if ".part" in each]


def test_backup_on_full_disk_leaves_no_files(service: Service, path: str, disk: Path) -> None:
    done = invoke(service.home, "backup", disk / "out")
    assert done.exit_code == 1
    assert str(disk / "out") in done.stderr
    assert [each for each in (disk / "out").rglob("*") if each.is_file()] == []
    (disk / "filler").unlink()
    assert invoke(service.home, "backup", disk / "out").exit_code == 0


def test_restore_on_full_disk_leaves_no_files(
    service: Service, path: str, disk: Path, tmp_path: Path
) -> None:
    assert invoke(service.home, "backup", tmp_path / "kept").exit_code == 0
    command = ("restore", tmp_path / "kept", "--home", disk / "home")
    done = invoke(service.home, *command)
    assert done.exit_code == 1
    assert f"{disk}/.home.restoring" in done.stderr
    assert left_on(disk) == []
    (disk / "filler").unlink()
    assert invoke(service.home, *command).exit_code == 0
