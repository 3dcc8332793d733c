"""Lists and details by ``everstep run``, ``checkpoint`` and ``session``."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from unittest import mock

import pytest
from httpx import Response

import everstep
from everstep.cli.common.target import Service as Target
from tests.cli.remote import failure, invoke, print_of, read_json
from tests.client.keeping_service import KeepingService
from tests.conftest import Service
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow


@dataclass
class Saved:
    """A session with a run that has two training checkpoints and a sampler checkpoint."""

    url: str
    session: str
    run: str
    first: str
    second: str
    sampler: str


@pytest.fixture(scope="session")  # one: tests find it by its names
def saved(service: Service) -> Saved:
    metadata = {"everstep_run": "my-loop"}
    with everstep.ServiceClient(
        base_url=service.url, api_key="tml-test", display_name="cli listing", project_id="lab"
    ) as client:
        run = client.create_lora_training_client(MODEL, 4, 1, user_metadata=metadata).result()
        train(everstep, run, 1)
        first = run.save_state("one", user_metadata={"loss": "0.5"}).result().path
        second = run.save_state("two", ttl_seconds=7200).result().path
        sampler = run.save_weights_for_sampler("two").result().path
        session = run.model_id.split(":")[0]
    return Saved(service.url, session, run.model_id, first, second, sampler)


def paths(saved: Saved, *words: object) -> list[str]:
    found = read_json(saved.url, "checkpoint", "list", *words)["checkpoints"]
    return [each["tinker_path"] for each in found]


def test_list_shows_newest_first_and_filters(saved: Saved) -> None:
    mine = ("--run", saved.run)
    assert paths(saved, *mine) == [saved.sampler, saved.second, saved.first]
    assert paths(saved, *mine, "--kind", "training") == [saved.second, saved.first]
    assert paths(saved, *mine, "--kind", "sampler_weights") == [saved.sampler]
    assert paths(saved, *mine, "--name", "o*") == [saved.first]
    assert paths(saved, *mine, "--after", "1h") == [saved.sampler, saved.second, saved.first]
    assert paths(saved, *mine, "--before", "1h") == []
    assert paths(saved, *mine, "--limit", 1) == [saved.sampler]
    assert {saved.first, saved.second, saved.sampler} <= set(paths(saved))


def test_list_rows_end_with_the_path(saved: Saved) -> None:
    lines = print_of(saved.url, "checkpoint", "list", "--run", saved.run).splitlines()
    assert lines[0].split() == ["SAVED", "SIZE", "EXPIRES", "PATH"]
    assert [line.split()[-1] for line in lines[1:]] == [saved.sampler, saved.second, saved.first]
    assert "in 2 h" in lines[2]


def test_names_and_beginnings_stand_for_ids(saved: Saved) -> None:
    for run in (saved.run, saved.run[:20], saved.run[:-1], "my-loop"):
        assert read_json(saved.url, "run", "info", run)["training_run_id"] == saved.run
        assert set(paths(saved, "--run", run)) == {saved.first, saved.second, saved.sampler}
    for name, path in (
        ("my-loop:one", saved.first),
        (f"{saved.run[:20]}:one", saved.first),
        ("my-loop:weights/two", saved.second),
        ("my-loop:sampler_weights/two", saved.sampler),
        ("my-loop:latest", saved.sampler),
    ):
        assert read_json(saved.url, "checkpoint", "info", name)["tinker_path"] == path
        checked = read_json(saved.url, "checkpoint", "verify", name)
        assert [each["tinker_path"] for each in checked["results"]] == [path]
    session = read_json(saved.url, "session", "info", saved.session[:20])
    assert session["session_id"] == saved.session


def test_name_with_several_meanings_lists_them(saved: Saved) -> None:
    code, text = failure(saved.url, "checkpoint", "info", "my-loop:two")
    assert code == 2 and saved.second in text and saved.sampler in text
    assert failure(saved.url, "checkpoint", "info", "my-loop:three")[0] == 3


def test_info_shows_training_details(saved: Saved) -> None:
    info = read_json(saved.url, "checkpoint", "info", saved.first)
    assert info["tinker_path"] == saved.first
    assert info["user_metadata"] == {"loss": "0.5"}
    assert info["weights_info"]["lora_rank"] == 4
    assert info["details"]["step"] == 1
    assert {each["name"] for each in info["details"]["files"]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
    }
    text = print_of(saved.url, "checkpoint", "info", saved.first)
    assert saved.first in text and "adamw" in text and "0.5" in text


def test_runs_are_listed_by_last_use_and_loop_name(saved: Saved) -> None:
    named = read_json(saved.url, "run", "list", "--name", "my-*", "--project", "lab")
    assert [each["training_run_id"] for each in named["runs"]] == [saved.run]
    assert read_json(saved.url, "run", "list", "--before", "2020-01-01") == {"runs": [], "total": 0}
    assert print_of(saved.url, "run", "list", "--before", "2020-01-01") == "No runs.\n"
    assert saved.run in print_of(saved.url, "run", "list", "--after", "1d")
    info = read_json(saved.url, "run", "info", saved.run)
    assert info["base_model"] == MODEL
    assert len(info["checkpoints"]) == 3
    assert saved.first in print_of(saved.url, "run", "info", saved.run)


def test_sessions_are_listed_searched_and_shown(saved: Saved) -> None:
    assert saved.session in print_of(saved.url, "session", "list", "--limit", 0)
    with connect(everstep, saved.url) as other:
        other.create_lora_training_client(MODEL, 4, 1).result()
    short = invoke(saved.url, "session", "list", "--limit", 1)
    assert "--limit 0 shows all" in short.stderr
    assert read_json(saved.url, "session", "list", "--limit", 1)["more"] is True
    assert read_json(saved.url, "session", "list", "--limit", 0)["more"] is False
    found = read_json(
        saved.url, "session", "search", "CLI", "--project", "lab", "--status", "success"
    )
    assert [each["session_id"] for each in found["sessions"]] == [saved.session]
    assert found["sessions"][0]["checkpoints_count"] == 3
    assert read_json(saved.url, "session", "search", "cli", "--status", "active")["sessions"] == []
    assert read_json(saved.url, "session", "info", saved.session)["training_run_ids"] == [saved.run]


def test_session_is_moved_and_its_timeline_downloaded(saved: Saved, tmp_path: Path) -> None:
    assert read_json(saved.url, "session", "move", saved.session, "attic")["project_id"] == "attic"
    assert len(read_json(saved.url, "session", "search", "--project", "attic")["sessions"]) == 1
    assert "project lab" in print_of(saved.url, "session", "move", saved.session, "lab")
    file = tmp_path / "trace.json"
    print_of(saved.url, "session", "export-trace", saved.session, "--output", file)
    assert json.loads(file.read_text())["traceEvents"]
    url = print_of(saved.url, "session", "export-trace", saved.session, "--url-only")
    assert url.startswith(saved.url)


def test_finish_asks_for_confirmation_and_ends_session(service: Service) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, 4, 1).result()
    session = run.model_id.split(":")[0]
    code, text = failure(service.url, "session", "finish", session, answer="n\n")
    assert (code, text) == (1, "everstep: The session was not ended.")
    assert failure(service.url, "session", "finish", session, "--json")[0] == 2
    assert read_json(service.url, "session", "finish", session, "--yes")["reason"] == "interrupted"
    with pytest.raises(everstep.TinkerError):
        run.save_state("late").result()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("run", "info", "nothing"), 3, "everstep run list"),
        (("run", "info", ""), 2, "everstep run list"),
        (("checkpoint", "list", "--run", ""), 2, "everstep run list"),
        (("checkpoint", "info", "tinker://nothing/weights/x"), 3, "everstep run list"),
        (("checkpoint", "info", "nothing"), 2, "tinker://<run>/"),
        (("checkpoint", "list", "--kind", "big"), 2, "training, sampler, external"),
        (("checkpoint", "list", "--after", "soon"), 2, "7d"),
        (("checkpoint", "list", "--run", "nothing"), 3, "everstep run list"),
        (("session", "info", "nothing"), 3, "everstep session list"),
        (("session", "search", "--status", "asleep"), 2, "active"),
        (("session", "search", "--metadata", "x"), 2, "KEY=VALUE"),
    ],
)
def test_errors_are_one_line_with_advice(
    saved: Saved, words: tuple[str, ...], code: int, says: str
) -> None:
    found, text = failure(saved.url, *words)
    assert (found, text.startswith("everstep: "), says in text) == (code, True, True), text


def test_missing_checkpoint_of_existing_run_is_reported(saved: Saved) -> None:
    code, text = failure(saved.url, "checkpoint", "info", f"tinker://{saved.run}/weights/x")
    assert code == 3 and f"checkpoint list --run {saved.run}" in text


def test_unreachable_service_is_reported_at_once() -> None:
    code, text = failure("http://127.0.0.1:1", "run", "list")
    assert code == 4 and "everstep serve" in text and "--base-url" in text
    code, text = failure("http://example.invalid", "run", "list", "--api-key", "key")
    assert code == 5 and "tml-" in text


@pytest.mark.parametrize("address", ["127.0.0.1:8055", "http://[bad", "ftp://host", "http://"])
def test_malformed_address_is_reported(address: str) -> None:
    code, text = failure(address, "run", "list")
    assert code == 2 and repr(address) in text and "http://HOST:PORT" in text


class _Other(BaseHTTPRequestHandler):
    """A server of another protocol."""

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.send_error(501)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def test_server_of_another_protocol_is_reported_at_once() -> None:
    with HTTPServer(("127.0.0.1", 0), _Other) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            code, text = failure(url, "checkpoint", "list")
        finally:
            server.shutdown()
            thread.join()
    assert code == 4 and "is not a Tinker service" in text and "--base-url" in text


def test_refused_api_key_is_reported_in_the_service_words() -> None:
    with mock.patch.object(Target, "send", return_value=Response(401, json={"detail": "not you"})):
        assert failure("http://127.0.0.1:1", "run", "list") == (
            5,
            "everstep: the service refused: not you",
        )


def test_starting_service_is_retried_with_a_message(saved: Saved) -> None:
    with mock.patch.object(Target, "send", return_value=Response(503, text="starting")):
        done = invoke(saved.url, "run", "info", saved.run)
    assert done.exit_code == 0 and "answers 503" in done.stderr


def test_default_service_is_that_of_the_home(
    saved: Saved, service: Service, tmp_path: Path
) -> None:
    done = invoke("", "checkpoint", "list", "--run", saved.run, "--home", service.home, "--json")
    assert json.loads(done.stdout)["total"] == 3
    code, text = failure("", "run", "list", "--home", tmp_path / "none")
    assert code == 4 and "everstep serve" in text
    assert not (tmp_path / "none").exists()


def test_ctrl_c_ends_command_at_once_without_traceback() -> None:
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as listener:  # accepts connections, and never responds
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "everstep.cli", "run", "list", "--base-url", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            connection.close()
    assert (process.returncode, "Traceback" in said) == (130, False), said


def test_other_service_is_listed_without_details() -> None:
    with KeepingService() as other:
        with connect(everstep, other.url) as client:
            run = client.create_lora_training_client("fake/model", 4, 1).result()
            path = run.save_state("x").result().path
        assert read_json(other.url, "checkpoint", "list")["checkpoints"][0]["tinker_path"] == path
        assert path in print_of(other.url, "checkpoint", "list", "--name", "x")
        code, text = failure(other.url, "session", "search", "x")
        assert code == 6 and "does not offer" in text
