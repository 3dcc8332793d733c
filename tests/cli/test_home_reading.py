"""Commands that list and show: the same from a home's files as from its service."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from everstep import service_home
from everstep.cli.app import app
from everstep.cli.common import completion, output
from everstep.cli.common.home_transport import HomeTransport, connect
from everstep.client._transport.futures import submit
from everstep.engine import Model
from everstep.ledger.sqlite.database import schemas
from everstep.runtime.home_reader import HomeReader
from tests.cli.gateway import listening
from tests.runtime.local import Local, pico
from tests.waiting import eventually

__all__ = ["pico"]
HEAVY = ("torch", "transformers", "numpy", "fastapi", "uvicorn", "alembic", "structlog")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    """A service with a session, two runs, checkpoints of all kinds, and a damaged file."""
    with Local(tmp_path_factory.mktemp("reading") / "home", pico) as service:
        session = service.session(
            display_name="reading ünïcode", project_id="lab", user_metadata={"a": "b"}
        )
        for seed in (1, 2):
            run = service.new_run(seed)
            service.train(run, seed)
            service.do(run, "save_weights", path="one", ttl_seconds=7200)
            service.do(run, "save_weights", path="two", user_metadata={"loss": "0.5"})
            service.do(run, "save_weights_for_sampler", path="two")
        vault = service.home / "vault"
        damaged = max(vault.glob("blobs/*/*"), key=lambda each: each.name)
        damaged.write_bytes(b"\0" * damaged.stat().st_size)
        assert session
        eventually("the record of models", (service.home / "model_info.json").exists)
        yield service


@pytest.fixture(scope="module")
def names(local: Local) -> dict[str, str]:
    """What the words of commands stand for."""
    session = local.session()
    run = f"{session}:train:0"
    return {"SESSION": session, "RUN": run, "PATH": f"tinker://{run}/weights/two"}


def call(home: Path, *words: str, **environment: str) -> Result:
    return CliRunner().invoke(
        app,
        [*words, "--home", str(home)],
        env={"COLUMNS": "400", "TINKER_BASE_URL": None, "TINKER_API_KEY": None} | environment,
    )


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock of ages."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2100, 1, 1, tzinfo=tz)

    monkeypatch.setattr(output, "datetime", Clock)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "words",
    [
        "run list",
        "run list --limit 1",
        "run list --after 1h --project lab",
        "run list --project nobody",
        "run info RUN",
        "run info absent",
        "run info a%2Fb",
        "run info ../x?y=z",
        "session list",
        "session list --limit 0",
        "session search reading --project lab --metadata a=b --status active",
        "session search reading --status failed",
        "session info SESSION",
        "session info absent",
        "checkpoint list",
        "checkpoint list --run RUN --kind training --name o*",
        "checkpoint list --run absent",
        "checkpoint info PATH",
        "checkpoint info RUN:latest",
        "checkpoint info RUN:one",
        "checkpoint info tinker://absent/weights/x",
        "checkpoint info nonsense",
        "vault quarantined",
    ],
)
def test_command_prints_the_same_with_and_without_a_service(
    local: Local, names: dict[str, str], words: str, form: str
) -> None:
    for name, meaning in names.items():
        words = words.replace(name, meaning)
    asked = [*words.split(), *(["--json"] if form == "json" else [])]
    with listening(local):
        served = call(local.home, *asked)
    read = call(local.home, *asked)
    assert (served.stdout, served.stderr) == (read.stdout, read.stderr)
    assert served.exit_code == read.exit_code
    assert served.output, "it prints something"


def ask(home: Path, *requests: tuple[str, str, dict[str, Any]]) -> list[tuple[int, bytes]]:
    """Send requests to a home's files."""

    async def work() -> list[tuple[int, bytes]]:
        reader = await HomeReader.open(home)
        transport = HomeTransport(reader)
        async with httpx.AsyncClient(transport=transport, base_url="http://test/api/v1/") as client:
            answers = [await client.request(m, path, **more) for m, path, more in requests]
        await reader.close()
        return [(each.status_code, each.content) for each in answers]

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("method", "path", "more"),
    [
        ("GET", "training_runs", {}),
        ("GET", "training_runs", {"params": {"limit": 1, "offset": 1}}),
        ("GET", "training_runs/RUN", {}),
        ("GET", "training_runs/absent", {}),
        ("GET", "training_runs/RUN/checkpoints", {}),
        ("GET", "training_runs/absent/checkpoints", {}),
        ("GET", "checkpoints", {"params": {"limit": 2, "offset": 1}}),
        ("GET", "checkpoints", {}),
        ("GET", "sessions", {}),
        ("GET", "sessions/SESSION", {}),
        ("GET", "sessions/absent", {}),
        ("POST", "sessions/search", {"json": {"limit": 1, "display_name": "reading"}}),
        ("POST", "sessions/search", {"json": {"limit": "many"}}),
        ("POST", "sessions/search", {"content": b"{"}),
        ("POST", "weights_info", {"json": {"tinker_path": "PATH"}}),
        ("POST", "weights_info", {"json": {"tinker_path": "tinker://a/weights/b"}}),
        ("POST", "weights_info", {"json": {"tinker_path": "nonsense"}}),
        ("POST", "weights_info", {"json": {}}),
        ("POST", "everstep/checkpoints/details", {"json": {"tinker_path": "PATH"}}),
        ("POST", "everstep/checkpoints/details", {"json": {"tinker_path": "nonsense"}}),
        ("GET", "everstep/vault/quarantine", {}),
    ],
)
def test_route_answers_with_the_same_bytes(
    local: Local, names: dict[str, str], method: str, path: str, more: dict[str, Any]
) -> None:
    for name, meaning in names.items():
        path = path.replace(name, meaning)
    if more.get("json", {}).get("tinker_path") == "PATH":
        more = {"json": {"tinker_path": names["PATH"]}}
    answer = local.http.request(method, path, **more)
    assert ask(local.home, (method, path, more)) == [(answer.status_code, answer.content)]


@pytest.mark.parametrize(
    ("method", "path"),
    [("DELETE", "training_runs/r/checkpoints/weights/x"), ("POST", "create_session")],
)
def test_other_requests_need_a_service(local: Local, method: str, path: str) -> None:
    ((status, body),) = ask(local.home, (method, path, {"json": {}} if method == "POST" else {}))
    assert status == 501 and b"needs a service that runs" in body


def test_nothing_heavy_is_imported_and_no_service_started(local: Local, tmp_path: Path) -> None:
    home = copy_of(local, tmp_path)
    before = content_of(home)
    code = f"""
import sys
sys.argv = ["everstep", "run", "list", "--home", {str(home)!r}]
from everstep.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(*(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *rows, heavy = done.stdout.splitlines()
    assert len(rows) == 3 and heavy == ""
    assert content_of(home) == before


def copy_of(local: Local, directory: Path) -> Path:
    """Copy a home while its service writes it: as a crash would leave it."""
    home = directory / "copy"
    shutil.copytree(local.home, home)
    assert (home / "ledger.sqlite-wal").stat().st_size > 0
    (home / "ledger.sqlite-shm").unlink()
    return home


def content_of(home: Path) -> dict[str, bytes]:
    """The content of a home's files, without SQLite's index of its log."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.name != "ledger.sqlite-shm"
    }


def test_list_after_a_crash_shows_what_was_acknowledged(local: Local, tmp_path: Path) -> None:
    home = copy_of(local, tmp_path)
    listed = call(home, "checkpoint", "list", "--json")
    assert listed.exit_code == 0
    assert listed.stdout == call(local.home, "checkpoint", "list", "--json").stdout


@contextmanager
def read_only(home: Path) -> Iterator[Path]:
    """Yield a path at which a home can't be changed."""
    if os.geteuid() != 0:
        directories = [home, *(path for path in home.rglob("*") if path.is_dir())]
        for each in directories:
            each.chmod(0o555)
        try:
            yield home
        finally:
            for each in directories:
                each.chmod(0o755)
        return
    mounted = home.with_name("mounted")
    mounted.mkdir()
    try:
        for words in (["--bind", str(home)], ["-o", "remount,ro,bind"]):
            done = subprocess.run(["mount", *words, str(mounted)], capture_output=True, check=False)
            if done.returncode != 0:
                pytest.skip("a read-only home needs a bind mount, or another user than root")
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], capture_output=True, check=False)


@pytest.fixture(params=["log", "no log"])
def frozen(local: Local, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A home that can't be changed, of a service that crashed, or that has stopped."""
    home = copy_of(local, tmp_path)
    if request.param == "no log":
        with sqlite3.connect(home / "ledger.sqlite") as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        assert not (home / "ledger.sqlite-wal").exists()
    with read_only(home) as mounted:
        yield mounted


def test_read_only_home_can_be_listed(local: Local, names: dict[str, str], frozen: Path) -> None:
    for words in (["run", "list"], ["checkpoint", "info", names["PATH"]], ["session", "list"]):
        there = call(local.home, *words, "--json")
        assert there.exit_code == 0
        assert call(frozen, *words, "--json").stdout == there.stdout


def test_home_that_is_absent_is_reported_and_not_created(tmp_path: Path) -> None:
    done = call(tmp_path / "absent", "run", "list")
    assert done.exit_code == 4
    assert f"No service runs on {tmp_path / 'absent'}, and there is no home." in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_lost_ledger_is_reported(tmp_path: Path) -> None:
    (tmp_path / "vault").mkdir()
    done = call(tmp_path, "run", "list")
    assert done.exit_code == 1
    assert "no ledger.sqlite" in done.stderr and "everstep restore" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["vault"]


def test_ledger_without_acknowledged_transactions_is_reported(local: Local, tmp_path: Path) -> None:
    home = copy_of(local, tmp_path)
    local.post("session_heartbeat", session_id=local.session())
    shutil.copy(local.home / "ledger.sqlite.position", home)
    done = call(home, "run", "list")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "lacks 1 of" in line and "everstep restore" in line
    (home / "ledger.sqlite-wal").unlink()
    done = call(home, "run", "list")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "can't be read: no such table" in line and "everstep restore" in line


@pytest.mark.parametrize(
    ("schema", "advice"), [("0009", "everstep serve"), ("9999", "a newer release")]
)
def test_ledger_of_another_release_is_not_migrated(
    local: Local, tmp_path: Path, schema: str, advice: str
) -> None:
    home = copy_of(local, tmp_path)
    path = home / "ledger.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (schema,))
    database.close()
    before = path.read_bytes()
    done = call(home, "run", "list")
    assert done.exit_code == 1
    assert f"has schema {schema}" in done.stderr and advice in done.stderr
    assert path.read_bytes() == before


def test_schemas_are_those_that_alembic_knows() -> None:
    from alembic.script import ScriptDirectory

    from everstep.ledger.sqlite.database import _config

    scripts = ScriptDirectory.from_config(_config())
    assert [each.revision for each in scripts.walk_revisions()] == schemas()[::-1]
    assert scripts.get_current_head() == schemas()[-1]


def test_list_succeeds_while_a_service_starts_writes_and_stops(tmp_path: Path, pico: Model) -> None:
    home = tmp_path / "home"
    with Local(home, pico) as first:
        run = first.new_run()
    stop = False

    def lists() -> list[int]:
        codes = []
        while not stop:
            done = call(home, "run", "list", "--json")
            assert done.exit_code != 0 or run in done.stdout
            codes.append(done.exit_code)
        return codes

    with ThreadPoolExecutor() as pool:
        listed = pool.submit(lists)
        try:
            service = first
            for shift in range(3):
                service = service.after()
                with service:
                    service.train(run, shift)
        finally:
            stop = True
        codes = listed.result()
    assert codes and set(codes) == {0}


def test_reading_does_not_execute_what_waits(tmp_path: Path, pico: Model) -> None:
    with Local(tmp_path / "home", pico).killed() as service:
        run = service.new_run()
        service.steps.close()
        service.send(run, "save_weights", path="waits")
    for _ in range(2):
        done = call(service.home, "checkpoint", "list", "--json")
        assert '"checkpoints": []' in done.stdout
    service.steps.open()
    with service.after():
        eventually(
            "the save",
            lambda: "weights/waits" in call(service.home, "checkpoint", "list").stdout,
        )


def test_api_key_is_checked_as_for_a_service(local: Local) -> None:
    done = call(local.home, "run", "list", TINKER_API_KEY="nonsense")
    assert done.exit_code == 5 and "has to begin with 'tml-'" in done.stderr


def test_address_of_another_service_is_never_replaced_by_the_home(local: Local) -> None:
    done = call(local.home, "run", "list", TINKER_BASE_URL="http://127.0.0.1:9")
    assert done.exit_code == 4


def test_ids_are_completed_without_a_service(
    local: Local, names: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    monkeypatch.setenv("EVERSTEP_HOME", str(local.home))
    assert names["RUN"] in completion.run_ids(names["RUN"][:4])
    assert completion.session_ids("") == [names["SESSION"]]
    assert names["PATH"] in completion.checkpoint_paths("tinker://")
    monkeypatch.setenv("EVERSTEP_HOME", str(tmp_path))
    assert completion.run_ids("") == []
    (tmp_path / "ledger.sqlite").write_bytes(b"no database")
    assert completion.run_ids("") == []


def test_lock_of_a_read_only_home_is_seen(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with service_home.run_lock(home) as lock:
        lock.hold()
        assert service_home.is_held(home / "service.run.lock")
        with read_only(home) as mounted:
            assert service_home.is_held(mounted / "service.run.lock")
    assert not service_home.is_held(home / "service.run.lock")
    assert not service_home.is_held(home / "absent")
    assert not (home / "absent").exists()


def test_home_is_closed_when_a_command_has_read_it(local: Local, tmp_path: Path) -> None:
    home = copy_of(local, tmp_path)

    def handles() -> int:
        paths = Path("/proc/self/fd").iterdir()
        return sum(os.path.realpath(each) == str(home / "ledger.sqlite") for each in paths)

    with connect(home, None) as connection:
        assert submit(connection.http.send("GET", "/sessions")).result().status_code == 200
        assert handles() == 1
    assert handles() == 0
