"""Addresses of a service: announced so that they work, and asked without a proxy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from everstep.cli.app import app
from everstep.cli.common import service_file
from everstep.server.serve import PortTaken, listen
from tests.conftest import READY, Service

CLI = [sys.executable, "-m", "everstep.cli"]
DEAD = "http://127.0.0.1:9"


def ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def serve(home: Path, host: str) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a service, and return it with the lines that it prints until it is ready."""
    arguments = ["serve", "--home", str(home), "--port", "0", "--host", host]
    process = subprocess.Popen(
        [*CLI, *arguments, "--until-stdin-closes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith(READY):
            return process, lines
    raise AssertionError(f"it did not start: {lines}")


@pytest.mark.slow
@pytest.mark.skipif(not ipv6(), reason="this machine has no IPv6")
def test_service_on_all_addresses_announces_one_that_works(tmp_path: Path) -> None:
    process, lines = serve(tmp_path / "home", "::")
    try:
        assert lines[0] == "everstep: listening on every address of this machine (::)"
        address = lines[-1].removeprefix(READY)
        assert address.startswith("http://[::1]:")
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert service_file.find_address(tmp_path / "home") == address
        done = CliRunner().invoke(app, ["run", "list", "--home", str(tmp_path / "home"), "--json"])
        assert done.exit_code == 0, done.output
    finally:
        process.communicate(timeout=60)


@pytest.mark.slow
def test_commands_ask_no_proxy_for_a_service_on_this_machine(service: Service) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy"), DEAD)
    environment = {**os.environ, **proxies, "NO_PROXY": "", "no_proxy": ""}
    port = httpx.URL(service.url).port
    done = subprocess.run(
        [*CLI, "session", "list", "--base-url", f"http://localhost:{port}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_damaged_record_of_an_address_is_no_address(tmp_path: Path) -> None:
    owned = '{"address": "http://127.0.0.1:9", "owner": %s}'
    contents = ['{"address": "http://::1:8055"}', '{"address": 5}', "[]", "null", "{"]
    contents += [owned % owner for owner in ('"x"', "1" + "0" * 30, "-1.5", "[]")]
    for content in contents:
        (tmp_path / "service.json").write_text(content)
        assert service_file.find_address(tmp_path) is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0"])
def test_listening_takes_addresses_and_names(host: str) -> None:
    with listen(host, 0) as listener:
        assert listener.getsockname()[1] > 0


def test_unknown_host_is_reported() -> None:
    with pytest.raises(PortTaken, match=r"nowhere\.invalid:0"):
        listen("nowhere.invalid", 0)
    with pytest.raises(PortTaken, match=r"\[2001:db8::1\]:0"):
        listen("2001:db8::1", 0)


@pytest.mark.parametrize("port", ["-1", "65536", "9" * 5000, "8e3"])
def test_port_out_of_range_is_wrong_usage(port: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "--home", str(tmp_path), "--port", port])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e400", "9" * 5000])
@pytest.mark.parametrize(
    "command",
    [
        ["vault", "gc", "--grace"],
        ["vault", "prune", "run", "--keep-last", "1", "--ttl"],
        ["sample", "Hello", "--temperature"],
        ["sample", "Hello", "--top-p"],
        ["sample", "Hello", "--max-tokens"],
        ["train", "rows.jsonl", "--learning-rate"],
        ["conformance", "--base-url", DEAD, "--timeout"],
        ["mirror", "run", "--every"],
    ],
    ids=" ".join,
)
def test_number_that_is_none_is_wrong_usage(command: list[str], number: str) -> None:
    done = CliRunner().invoke(app, [*command, number])
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = json.dumps({"sessions": ["one"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def answering() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_completion_asks_no_proxy(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from everstep.cli.common.completion import session_ids

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", DEAD)
    monkeypatch.setenv("TINKER_BASE_URL", answering)
    assert session_ids("o") == ["one"]


def test_missing_home_directory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def expand(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("EVERSTEP_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", expand)
    done = CliRunner().invoke(app, ["run", "list"])
    assert done.exit_code == 2
    assert "HOME is not set" in " ".join(done.output.replace("│", " ").split())
