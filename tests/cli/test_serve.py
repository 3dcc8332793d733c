"""`everstep serve`, as it is typed."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import everstep.cli
from tests.faults.keeper import Keeper

pytestmark = pytest.mark.slow
SERVE = [sys.executable, "-m", "everstep.cli", "serve"]


def serve(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SERVE, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def told(*arguments: str) -> tuple[int, str]:
    """Exit code and last words of a service that can't start."""
    process = serve(*arguments)
    _, words = process.communicate(timeout=120)
    return process.returncode, words


@pytest.mark.parametrize("options", [[], ["--until-stdin-closes"]], ids=" ".join)
@pytest.mark.parametrize(
    ("number", "environment"),
    [(signal.SIGINT, {"EVERSTEP_HOME": "{}/.everstep"}), (signal.SIGTERM, {"HOME": "{}"})],
    ids=["Ctrl-C, EVERSTEP_HOME", "SIGTERM, no home given"],
)
def test_one_line_when_it_is_ready_and_a_clean_end(
    number: signal.Signals,
    environment: dict[str, str],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("EVERSTEP_HOME", raising=False)
    where = {name: value.format(tmp_path) for name, value in environment.items()}
    process = serve("--port", "0", *options, **where)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("everstep: ready at http://127.0.0.1:")
    address = line.split()[-1]
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
    models = httpx.get(f"{address}/api/v1/get_server_capabilities").json()["supported_models"]
    assert [model["model_name"] for model in models] == ["everstep/pico"]
    process.send_signal(number)
    rest, log = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert "worker ready" in log
    assert "Traceback" not in log
    assert (tmp_path / ".everstep" / "ledger.sqlite").exists()


def test_where_it_listens_when_nothing_is_said() -> None:
    parameters = inspect.signature(everstep.cli.serve).parameters
    assert (parameters["host"].default, parameters["port"].default) == ("127.0.0.1", 8055)


def test_it_is_healthy_only_while_requests_will_succeed(tmp_path: Path) -> None:
    with Keeper(tmp_path / "home") as keeper:
        seen = {keeper.ready()}
        keeper.wait_ready()
        keeper.kill_worker()
        answer = keeper.wait_until(
            lambda: (found := httpx.get(f"{keeper.url}/healthz")).status_code == 503 and found
        )
        assert answer.json() == {"detail": "The worker is not ready; try again."}
        assert answer.headers["retry-after"] == "1"
        keeper.wait_ready()
        assert seen == {False}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "x=/nowhere"], "model 'x' can't be loaded from '/nowhere'"),
        (["--model", "=/tmp"], "is not NAME=PATH_OR_HUB_ID"),
        (["--model", "a=/x", "--model", "a=/y"], "is given twice"),
        (["--set", "speed=11"], "is not name=value of a setting"),
        (["--set", "gap_seconds=soon"], "valid number"),
    ],
)
def test_what_can_not_be_served_is_told_without_a_traceback(
    arguments: list[str], text: str, tmp_path: Path
) -> None:
    code, words = told("--home", str(tmp_path / "home"), "--port", "0", *arguments)
    assert code in (1, 2)
    assert text in " ".join(words.replace("│", " ").split())
    assert "Traceback" not in words


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, words = told("--home", str(tmp_path / "home"), "--port", port)
    assert code == 1
    assert words.startswith(f"everstep: Can't listen on 127.0.0.1:{port}")
