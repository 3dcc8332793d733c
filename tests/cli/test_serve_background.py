"""``everstep serve --detach``, ``status``, ``stop`` and ``logs``, with real services."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import everstep
from everstep import service_home
from tests.cli import background
from tests.cli.background import PATIENCE, call, clean_up, kill, start_command, status
from tests.conftest import Service
from tests.faults.keeper import free_port
from tests.scenario import MODEL, connect, train
from tests.waiting import eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="follows processes by Linux's /proc"),
]


SHELL = 'out=$("$@"); code=$?; echo "$out"; echo "code $code"; cat'


class Terminal:
    """A terminal with a shell in it, which types one command in a directory."""

    def __init__(self, directory: Path, *command: str) -> None:
        self._ours, theirs = pty.openpty()
        with os.fdopen(theirs, "rb+", buffering=0) as terminal:
            self.shell = subprocess.Popen(
                ["/bin/sh", "-c", SHELL, "sh", *command],
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                env=background.environment(),
                cwd=directory,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
            )

    def read_until(self, text: str) -> str:
        """Return what the terminal shows up to a text."""
        shown = b""
        while text.encode() not in shown:
            shown += os.read(self._ours, 4096)
        return shown.decode()

    def close(self) -> None:
        """Close the window: the kernel sends SIGHUP to what runs in it."""
        os.close(self._ours)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.shell.pid, signal.SIGHUP)
        self.shell.wait(PATIENCE)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of a service that was started in the background, in a terminal that is closed.

    The terminal is in a directory whose files have the names of modules that a service imports.
    """
    home = tmp_path_factory.mktemp("background") / "home"
    for name in ("random", "tokenizers", "transformers"):
        (home.parent / f"{name}.py").write_text('raise ImportError("a file of the user\'s")')
    terminal = Terminal(
        home.parent, *background.SERVE, "--detach", "--port", str(free_port()), "--home", str(home)
    )
    try:
        shown = terminal.read_until("code ")
        terminal.close()
        assert "everstep: ready at http://127.0.0.1:" in shown
        assert f"everstep serve stop --home {home}" in shown
        yield home
    finally:
        clean_up(home)


@pytest.fixture
def home(started: Path) -> Path:
    """The home, with a service that runs in the background. A former test may have ended it."""
    if service_home.living(started) is None:
        assert call(started, "--detach", "--port", str(free_port()))[0] == 0
    return started


def test_service_survives_its_terminal_and_tells_its_state(home: Path) -> None:
    code, out, _ = call(home, "status")
    found = status(home)
    process = found["process"]
    assert code == 0 and found["state"] == "ready" and found["running"] and found["ready"]
    assert os.getsid(process) == os.getpgid(process) == process
    assert [str(Path(f"/proc/{process}/fd/{n}").readlink()) for n in range(3)] == [
        "/dev/null",
        found["log"],
        found["log"],
    ]
    assert found["log"] == str(home / "service.log") and not found["embedded"]
    assert found["models"] == {MODEL: MODEL} and found["version"] == everstep.__version__
    assert found["memory_bytes"] > 10 << 20 and found["refused_models"] == {}
    for shown in (str(process), found["address"], MODEL, "in the background"):
        assert shown in out
    assert re.search(r"\b(ago|just now)\b", out)


def test_log_is_printed_whole_and_in_part(home: Path) -> None:
    whole = call(home, "logs")[1]
    assert "worker ready" in whole and whole == (home / "service.log").read_text()
    (last,) = call(home, "logs", "-n", "1")[1].splitlines()
    assert last == f"everstep: ready at {status(home)['address']}"


def test_second_start_says_who_runs(home: Path) -> None:
    running = status(home)
    for words in (["--detach"], []):
        code, out, messages = call(home, *words, "--port", "0")
        assert (code, out) == (1, "")
        assert f"process {running['process']} at {running['address']}" in messages
        assert "everstep serve stop" in messages
    assert status(home)["process"] == running["process"]


def test_stop_and_start_keep_acknowledged_work(home: Path, service: Service) -> None:
    reference: Any = connect(everstep, service.url)
    run = reference.create_lora_training_client(MODEL, rank=4, seed=5).result()
    expected = train(everstep, run, 4)
    before = status(home)
    client: Any = connect(everstep, before["address"])
    run = client.create_lora_training_client(MODEL, rank=4, seed=5).result()
    seen = train(everstep, run, 2)
    code, out, _ = call(home, "stop")
    assert code == 0 and f"process {before['process']}) has ended" in out
    assert call(home, "status")[0] == 3 and not (home / "service.json").exists()
    code, out, _ = call(home, "stop")
    assert code == 0 and out == f"No service runs on {home}.\n"
    port = before["address"].rpartition(":")[2]
    assert call(home, "--detach", "--port", port)[0] == 0
    seen += train(everstep, run, 2, shift=2)
    assert seen == expected
    for each in (client, reference):
        each.close().result()


def test_killed_service_is_told_apart_and_started_again(home: Path) -> None:
    process = kill(home)
    assert (home / "service.json").exists()
    code, out, messages = call(home, "status")
    assert code == 3 and out == f"No service runs on {home}.\n"
    assert f"process {process}, was killed or crashed (ready since 20" in messages
    assert status(home)["process"] is None
    assert call(home, "stop")[:2] == (0, f"No service runs on {home}.\n")
    code, out, _ = call(home, "--detach", "--port", "0")
    assert code == 0 and status(home)["process"] != process


def test_of_two_starts_at_once_one_wins_and_the_other_says_who(tmp_path: Path) -> None:
    home = tmp_path / "home"
    try:
        both = [start_command(home, "--detach", "--port", "0") for _ in range(2)]
        ended = [(*each.communicate(timeout=PATIENCE), each.returncode) for each in both]
        ((won, _, zero), (_, lost, one)) = sorted(ended, key=lambda each: each[2])
        assert (zero, one) == (0, 1)
        process = status(home)["process"]
        assert f"(process {process}," in won and f"process {process} at " in lost
    finally:
        clean_up(home)


@pytest.mark.parametrize("failing", ["port", "model", "setting"])
def test_failed_start_says_why_and_leaves_nothing(failing: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        words, code, reason = {
            "port": (["--port", port], 1, f"Can't listen on 127.0.0.1:{port}"),
            "model": (["--port", "0", "--model", "x=/nowhere"], 1, "loaded from '/nowhere'"),
            "setting": (["--set", "speed=11"], 2, "there is no setting 'speed'"),
        }[failing]
        ended, out, messages = call(home, "--detach", *words)
    assert (ended, out) == (code, "")
    assert f"everstep: the service exited with code {code} before it became ready" in messages
    assert f"Last lines of {home}/service.log:" in messages and reason in messages
    code, _, messages = call(home, "status")
    assert code == 3 and "did not become ready" in messages
    assert not service_home.is_starting(home)


def test_interrupted_start_leaves_no_service(tmp_path: Path) -> None:
    home = tmp_path / "home"
    starting = start_command(home, "--detach", "--port", "0", start_new_session=True)
    eventually("the start", lambda: service_home.living(home) is not None, PATIENCE)
    code, _, _ = call(home, "status")
    os.killpg(starting.pid, signal.SIGINT)
    _, messages = starting.communicate(timeout=PATIENCE)
    assert code in (0, 4) and starting.returncode == 130
    assert "the start was interrupted; no service runs" in messages
    assert call(home, "status")[0] == 3


def test_service_in_the_foreground_is_seen_and_stopped(tmp_path: Path) -> None:
    service = Service(tmp_path / "home")
    try:
        code, out, _ = call(service.home, "status")
        assert code == 0 and f"{service.process.pid}" in out and "in the foreground" in out
        code, out, messages = call(service.home, "logs")
        assert (code, out) == (1, "") and "its log is its terminal" in messages
        assert call(service.home, "stop")[0] == 0
        assert service.process.wait(PATIENCE) == 0
    finally:
        service.kill()


def test_embedded_service_with_clients_is_stopped_only_after_a_question(tmp_path: Path) -> None:
    home = tmp_path / "home"
    client: Any = everstep.ServiceClient(base_url="local", home=home)
    process = client.local_pid
    found = status(home)
    assert found["embedded"] and [each["process"] for each in found["clients"]] == [os.getpid()]
    code, _, messages = call(home, "stop")
    assert code == 1 and "Nothing was stopped" in messages
    assert f"process {os.getpid()}: " in messages
    assert status(home)["process"] == process
    assert call(home, "stop", "--yes")[0] == 0
    with pytest.raises(everstep.LocalServiceError, match="was stopped"):
        client.get_server_capabilities()
    assert call(home, "status")[0] == 3
    client.close().result()
