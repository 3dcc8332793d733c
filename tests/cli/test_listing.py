"""``everstep run|checkpoint|session`` list and tell what a service has."""

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
from everstep.cli.target import Service as Target
from tests.cli.remote import refused, said, told, typed
from tests.client.keeping_service import KeepingService
from tests.conftest import Service
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow


@dataclass
class Saved:
    """A session with a run that has two training checkpoints and one to sample from."""

    url: str
    session: str
    run: str
    first: str
    second: str
    sampler: str


@pytest.fixture(scope="session")  # once: it is found again by its names
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
    found = told(saved.url, "checkpoint", "list", *words)["checkpoints"]
    return [each["tinker_path"] for each in found]


def test_checkpoints_are_listed_newest_first_and_by_what_is_asked(saved: Saved) -> None:
    mine = ("--run", saved.run)
    assert paths(saved, *mine) == [saved.sampler, saved.second, saved.first]
    assert paths(saved, *mine, "--kind", "training") == [saved.second, saved.first]
    assert paths(saved, *mine, "--kind", "sampler_weights") == [saved.sampler]
    assert paths(saved, *mine, "--name", "o*") == [saved.first]
    assert paths(saved, *mine, "--after", "1h") == [saved.sampler, saved.second, saved.first]
    assert paths(saved, *mine, "--before", "1h") == []
    assert paths(saved, *mine, "--limit", 1) == [saved.sampler]
    assert {saved.first, saved.second, saved.sampler} <= set(paths(saved))


def test_a_path_can_be_copied_from_the_terminal(saved: Saved) -> None:
    lines = said(saved.url, "checkpoint", "list", "--run", saved.run).splitlines()
    assert lines[0].split() == ["SAVED", "(UTC)", "SIZE", "EXPIRES", "PATH"]
    assert [line.split()[-1] for line in lines[1:]] == [saved.sampler, saved.second, saved.first]
    assert "in 2 h" in lines[2]


def test_a_checkpoint_is_told_with_what_it_was_trained_with(saved: Saved) -> None:
    info = told(saved.url, "checkpoint", "info", saved.first)
    assert info["tinker_path"] == saved.first
    assert info["user_metadata"] == {"loss": "0.5"}
    assert info["weights_info"]["lora_rank"] == 4
    assert info["details"]["step"] == 1
    assert {each["name"] for each in info["details"]["files"]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
    }
    text = said(saved.url, "checkpoint", "info", saved.first)
    assert saved.first in text and "adamw" in text and "0.5" in text


def test_runs_are_listed_by_use_and_by_the_names_of_their_loops(saved: Saved) -> None:
    named = told(saved.url, "run", "list", "--name", "my-*", "--project", "lab")
    assert [each["training_run_id"] for each in named["runs"]] == [saved.run]
    assert told(saved.url, "run", "list", "--before", "2020-01-01") == {"runs": [], "total": 0}
    assert said(saved.url, "run", "list", "--before", "2020-01-01") == "No runs.\n"
    assert saved.run in said(saved.url, "run", "list", "--after", "1d")
    info = told(saved.url, "run", "info", saved.run)
    assert info["base_model"] == MODEL
    assert len(info["checkpoints"]) == 3
    assert saved.first in said(saved.url, "run", "info", saved.run)


def test_sessions_are_listed_found_and_told(saved: Saved) -> None:
    assert saved.session in said(saved.url, "session", "list", "--limit", 0)
    with connect(everstep, saved.url) as other:
        other.create_lora_training_client(MODEL, 4, 1).result()
    short = typed(saved.url, "session", "list", "--limit", 1)
    assert "--limit 0 shows all" in short.stderr
    assert told(saved.url, "session", "list", "--limit", 1)["more"] is True
    assert told(saved.url, "session", "list", "--limit", 0)["more"] is False
    found = told(saved.url, "session", "search", "CLI", "--project", "lab", "--status", "success")
    assert [each["session_id"] for each in found["sessions"]] == [saved.session]
    assert found["sessions"][0]["checkpoints_count"] == 3
    assert told(saved.url, "session", "search", "cli", "--status", "active")["sessions"] == []
    assert told(saved.url, "session", "info", saved.session)["training_run_ids"] == [saved.run]


def test_a_session_is_moved_and_its_time_line_fetched(saved: Saved, tmp_path: Path) -> None:
    assert told(saved.url, "session", "move", saved.session, "attic")["project_id"] == "attic"
    assert len(told(saved.url, "session", "search", "--project", "attic")["sessions"]) == 1
    assert "project lab" in said(saved.url, "session", "move", saved.session, "lab")
    file = tmp_path / "trace.json"
    said(saved.url, "session", "export-trace", saved.session, "--output", file)
    assert json.loads(file.read_text())["traceEvents"]
    url = said(saved.url, "session", "export-trace", saved.session, "--url-only")
    assert url.startswith(saved.url)


def test_a_session_is_finished_when_that_is_agreed_to(service: Service) -> None:
    client = connect(everstep, service.url)
    run = client.create_lora_training_client(MODEL, 4, 1).result()
    session = run.model_id.split(":")[0]
    code, text = refused(service.url, "session", "finish", session, answer="n\n")
    assert (code, text) == (1, "everstep: The session was not ended.")
    assert refused(service.url, "session", "finish", session, "--json")[0] == 2
    assert told(service.url, "session", "finish", session, "--yes")["reason"] == "interrupted"
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
def test_what_is_wrong_is_said_in_one_line_with_what_to_do(
    saved: Saved, words: tuple[str, ...], code: int, says: str
) -> None:
    found, text = refused(saved.url, *words)
    assert (found, text.startswith("everstep: "), says in text) == (code, True, True), text


def test_a_checkpoint_that_is_not_there_is_told_apart_from_its_run(saved: Saved) -> None:
    code, text = refused(saved.url, "checkpoint", "info", f"tinker://{saved.run}/weights/x")
    assert code == 3 and f"checkpoint list --run {saved.run}" in text


def test_a_service_that_can_not_be_reached_is_told_at_once() -> None:
    code, text = refused("http://127.0.0.1:1", "run", "list")
    assert code == 4 and "everstep serve" in text and "--base-url" in text
    code, text = refused("http://example.invalid", "run", "list", "--api-key", "key")
    assert code == 5 and "tml-" in text


@pytest.mark.parametrize("address", ["127.0.0.1:8055", "http://[bad", "ftp://host", "http://"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    code, text = refused(address, "run", "list")
    assert code == 2 and repr(address) in text and "http://HOST:PORT" in text


class _Other(BaseHTTPRequestHandler):
    """Some server that has nothing to do with the protocol."""

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.send_error(501)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_server_of_something_else_is_told_at_once() -> None:
    with HTTPServer(("127.0.0.1", 0), _Other) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            code, text = refused(url, "checkpoint", "list")
        finally:
            server.shutdown()
            thread.join()
    assert code == 4 and "not as a Tinker service" in text and "--base-url" in text


def test_a_service_that_refuses_the_key_is_told_by_its_own_words() -> None:
    with mock.patch.object(Target, "send", return_value=Response(401, json={"detail": "not you"})):
        assert refused("http://127.0.0.1:1", "run", "list") == (
            5,
            "everstep: the service refused: not you",
        )


def test_a_service_that_starts_is_waited_for_and_that_is_told(saved: Saved) -> None:
    with mock.patch.object(Target, "send", return_value=Response(503, text="starting")):
        done = typed(saved.url, "run", "info", saved.run)
    assert done.exit_code == 0 and "answers 503" in done.stderr


def test_without_an_address_the_service_of_the_home_is_meant(
    saved: Saved, service: Service, tmp_path: Path
) -> None:
    done = typed("", "checkpoint", "list", "--run", saved.run, "--home", service.home, "--json")
    assert json.loads(done.stdout)["total"] == 3
    code, text = refused("", "run", "list", "--home", tmp_path / "none")
    assert code == 4 and "everstep serve" in text
    assert not (tmp_path / "none").exists()


def test_ctrl_c_ends_a_command_at_once_and_quietly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # it takes requests, and is silent
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "everstep.cli", "run", "list", "--base-url", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            connection.close()
    assert (process.returncode, "Traceback" in said) == (130, False), said


def test_another_service_of_the_protocol_is_listed_and_lacks_details() -> None:
    with KeepingService() as other:
        with connect(everstep, other.url) as client:
            run = client.create_lora_training_client("fake/model", 4, 1).result()
            path = run.save_state("x").result().path
        assert told(other.url, "checkpoint", "list")["checkpoints"][0]["tinker_path"] == path
        assert path in said(other.url, "checkpoint", "list", "--name", "x")
        code, text = refused(other.url, "session", "search", "x")
        assert code == 6 and "does not offer" in text
