"""``everstep serve``, in a process of its own."""

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

import everstep.cli.serve.app
from tests.conftest import Service
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


def read_json(*arguments: str) -> tuple[int, str]:
    """Exit code and error output of a service that can't start."""
    process = serve(*arguments)
    _, words = process.communicate(timeout=120)
    return process.returncode, words


@pytest.mark.parametrize("options", [[], ["--until-stdin-closes"]], ids=" ".join)
@pytest.mark.parametrize(
    ("number", "environment"),
    [(signal.SIGINT, {"EVERSTEP_HOME": "{}/.everstep"}), (signal.SIGTERM, {"HOME": "{}"})],
    ids=["Ctrl-C, EVERSTEP_HOME", "SIGTERM, no home given"],
)
def test_serve_prints_one_ready_line_and_ends_cleanly(
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


def test_serve_listens_on_loopback_by_default() -> None:
    parameters = inspect.signature(everstep.cli.serve.app.serve).parameters
    assert (parameters["host"].default, parameters["port"].default) == ("127.0.0.1", 8055)


def test_service_is_healthy_only_while_requests_succeed(tmp_path: Path) -> None:
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
        (["--set", "speed=11"], "there is no setting 'speed' (in --set speed=11)"),
        (["--set", "gap_seconds=soon"], "valid number"),
    ],
)
def test_unusable_model_is_reported_without_traceback(
    arguments: list[str], text: str, tmp_path: Path
) -> None:
    code, words = read_json("--home", str(tmp_path / "home"), "--port", "0", *arguments)
    assert code in (1, 2)
    assert text in " ".join(words.replace("│", " ").split())
    assert "Traceback" not in words


def test_home_with_a_running_service_says_who_serves_there(service: Service) -> None:
    code, words = read_json("--home", str(service.home), "--port", "0")
    assert code == 1 and "Traceback" not in words
    assert f"a service runs on {service.home} already: process " in words
    assert f"TINKER_BASE_URL={service.url}" in words


def test_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, words = read_json("--home", str(tmp_path / "home"), "--port", port)
    assert code == 1
    assert words.startswith(f"everstep: Can't listen on 127.0.0.1:{port}")
