"""``everstep serve status``, ``stop`` and ``logs`` on homes that a test has made up: no service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from everstep import service_home
from everstep.cli.app import app
from everstep.cli.doctor.finding import Finding, State
from everstep.cli.doctor.service import check_service
from everstep.cli.serve import logs
from everstep.service_home import Lock, ServiceRecord
from tests.cli.background import PATIENCE, start_command


@pytest.fixture
def innocent() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is no service."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Lock]:
    """The run lock of a home, as a service holds it."""
    with service_home.run_lock(tmp_path) as lock:
        assert lock.hold(wait=False)
        yield lock


def record(home: Path, process: int = 0) -> ServiceRecord:
    """Describe a service that logs to its home."""
    log = str(service_home.log_path(home))
    return ServiceRecord("http://127.0.0.1:9", process or os.getpid(), log=log)


def run(home: Path, *words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["serve", *words, "--home", str(home)], env={"COLUMNS": "400"})
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("locked", [True, False])
def test_process_with_a_recycled_id_is_never_stopped(
    locked: bool, tmp_path: Path, innocent: subprocess.Popen[bytes]
) -> None:
    service_home.publish(tmp_path, record(tmp_path, innocent.pid))
    with service_home.run_lock(tmp_path) as lock:
        assert not locked or lock.hold(wait=False)
        code, out, messages = run(tmp_path, "stop", "--yes", "--timeout", "0")
    assert innocent.poll() is None
    if locked:
        assert code == 1 and "not the service that runs there. Nothing was stopped" in messages
    else:
        assert (code, out) == (0, f"No service runs on {tmp_path}.\n")


def test_service_that_takes_a_home_replaces_the_record_of_a_killed_one_first(
    tmp_path: Path, innocent: subprocess.Popen[bytes]
) -> None:
    """Else the lock would make the killed one's process id look like the holder's."""
    service_home.publish(tmp_path, record(tmp_path, innocent.pid))
    seen: list[ServiceRecord | None] = []

    class Watched(Lock):
        def hold(self, *, wait: bool = True) -> bool:
            try:
                return super().hold(wait=wait)
            finally:
                seen.append(service_home.living(tmp_path))

    own = replace(record(tmp_path), ready=False)
    with Watched(service_home.run_lock_path(tmp_path)) as lock:
        service_home.claim(tmp_path, own, lock)
        assert [None if each is None else each.process for each in seen] == [0]
        assert service_home.living(tmp_path) == own and service_home.running(tmp_path) is None


@pytest.mark.usefixtures("held")
def test_service_that_does_not_end_in_time_is_reported(tmp_path: Path) -> None:
    service_home.publish(tmp_path, record(tmp_path, 0))
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print(); input()"
    with (
        service_home.run_lock_path(tmp_path).open() as lock,
        subprocess.Popen(
            [sys.executable, "-c", stubborn],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(lock.fileno(),),  # as a service has it open
        ) as process,
    ):
        assert process.stdout is not None and process.stdout.readline()
        service_home.publish(tmp_path, record(tmp_path, process.pid))
        code, _, messages = run(tmp_path, "stop", "--timeout", "0.2")
        process.kill()
    assert code == 1 and f"process {process.pid}) was asked to stop and has not ended" in messages


@pytest.mark.parametrize(
    ("own", "state", "code"),
    [
        (None, "not running", 3),
        (ServiceRecord("", 1, ready=False), "starting", 4),
        (ServiceRecord("http://127.0.0.1:9", 1), "not answering", 4),
        (ServiceRecord("http://127.0.0.1:9", 1, stopping=True), "stopping", 4),
    ],
)
def test_state_of_a_service_that_is_not_ready(
    own: ServiceRecord | None, state: str, code: int, tmp_path: Path
) -> None:
    with service_home.run_lock(tmp_path) as lock:
        if own is not None:
            service_home.claim(tmp_path, replace(own, process=os.getpid()), lock)
        ended, out, _ = run(tmp_path, "status", "--json")
    assert ended == code
    assert f'"state": "{state}"' in out


def test_start_waits_for_the_end_of_a_service_that_stops(
    tmp_path: Path, held: Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    service_home.publish(tmp_path, replace(record(tmp_path), stopping=True))
    assert service_home.running(tmp_path) is not None

    class Waiting(Lock):
        def share(self, *, wait: bool = True) -> bool:
            assert wait and not super().share(wait=False)
            held.close()
            return super().share()

    monkeypatch.setattr(
        service_home, "run_lock", lambda home: Waiting(service_home.run_lock_path(home))
    )
    assert service_home.running_on(tmp_path) is None and held.handle is None
    assert service_home.was_stopped(tmp_path)


def test_log_that_grows_long_is_put_aside_while_others_write_to_it(tmp_path: Path) -> None:
    path, former = service_home.log_path(tmp_path), service_home.former_log_path(tmp_path)
    with path.open("a", buffering=1) as worker, path.open("a", buffering=1) as service:
        worker.write("short\n")
        service_home.bound_log(tmp_path, 10)
        assert path.read_text() == "short\n" and not former.exists()
        service.write("longer\n")
        service_home.bound_log(tmp_path, 10)
        worker.write("after\n")
        assert path.read_text() == "after\n" and former.read_text() == "short\nlonger\n"
    assert {each.name for each in tmp_path.iterdir()} == {path.name, former.name}


def test_start_that_has_no_process_yet_is_a_start(tmp_path: Path) -> None:
    with service_home.start_lock(tmp_path) as starting:
        starting.hold()
        code, out, _ = run(tmp_path, "status")
        assert code == 4 and "starting" in out
        code, _, messages = run(tmp_path, "stop", "--timeout", "0.1")
        assert code == 1 and "has not said which process it is" in messages


def test_doctor_says_that_a_service_starts_or_was_killed(tmp_path: Path) -> None:
    def finding() -> Finding:
        (found,) = check_service(None, None, tmp_path)
        return found

    assert finding().state is State.OK and "everstep serve --detach" in finding().found
    with service_home.run_lock(tmp_path) as lock:
        service_home.claim(tmp_path, replace(record(tmp_path, 7), ready=False), lock)
        assert finding().state is State.WARNING and "starts or stops" in finding().found
    assert finding().state is State.WARNING and "process 7) was killed" in finding().found


@pytest.mark.parametrize("words", [["--detach"], []], ids=["background", "foreground"])
def test_directory_that_cannot_be_a_home_is_named(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    code, out, messages = run(home, *words)
    assert (code, out) == (1, "")
    assert messages.startswith(f"everstep: {home} can't be used as a home: ")


@pytest.mark.parametrize("option", [["--home", "x"], ["--port", "0"], ["--detach"]])
def test_options_of_serve_before_a_command_are_refused(option: list[str]) -> None:
    done = CliRunner().invoke(app, ["serve", *option, "status"])
    assert done.exit_code == 2
    assert f"{option[0].lstrip('-')}" in done.stderr and "has no effect before" in done.stderr


def test_home_without_a_log_is_named(tmp_path: Path) -> None:
    code, out, messages = run(tmp_path, "logs")
    assert (code, out) == (3, "") and f"in the background on {tmp_path}" in messages


@pytest.mark.parametrize(
    "content", ["", "a\n", "a\nb", "a\nbc\n\nd\n", "\n\n\n", "a" * 9 + "\nb\n"]
)
@pytest.mark.parametrize("lines", [0, 1, 2, 3, 9])
def test_last_lines_are_found_across_blocks(
    content: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_BLOCK_BYTES", 3)
    path = service_home.log_path(tmp_path)
    path.write_text(content)
    expected = content.splitlines(keepends=True)
    with path.open("rb") as log:
        log.seek(logs._start_of_last(log, lines))
        assert log.read().decode() == "".join(expected[max(0, len(expected) - lines) :])


def test_log_is_followed_through_rotation_to_the_end_of_its_service(
    tmp_path: Path, held: Lock
) -> None:
    service_home.publish(tmp_path, record(tmp_path))
    path = service_home.log_path(tmp_path)
    path.write_text("first\nsecond\n")
    with start_command(tmp_path, "logs", "-f", "-n", "1") as process:
        try:
            shown = process.stdout
            assert shown is not None
            assert shown.readline() == "second\n"
            with path.open("a") as log:
                path.replace(tmp_path / "service.log.1")
                log.write("third, into the file that was put aside\n")
            path.write_text("fourth\n")
            assert shown.readline() == "third, into the file that was put aside\n"
            assert shown.readline() == "fourth\n"
            path.write_text("5\n")  # shorter: it was emptied in place
            assert shown.readline() == "5\n"
            os.kill(process.pid, signal.SIGSTOP)  # so that it does not see what is put aside
            with path.open("a", buffering=1) as log:
                log.write("sixth\n")
                service_home.bound_log(tmp_path, 1)
                log.write("7\n")
            os.kill(process.pid, signal.SIGCONT)
            assert [shown.readline() for _ in range(2)] == ["sixth\n", "7\n"]
            with path.open("a") as log:
                log.write("last\n")
            held.close()
            rest, messages = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, rest) == (0, "last\n")
    assert messages == "everstep: the service has ended\n"


def test_log_of_the_last_service_is_printed_and_not_followed(tmp_path: Path) -> None:
    service_home.log_path(tmp_path).write_bytes(b"\xffodd\n")
    with start_command(tmp_path, "logs", "-f", errors="surrogateescape") as process:
        out, messages = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "\udcffodd\n")
    assert f"no service runs on {tmp_path}" in messages
