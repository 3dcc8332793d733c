"""Followed acceptance: an operation's result comes behind its acceptance, where a client asks."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from everstep.engine import Model
from everstep.server.routes import futures as routes_futures
from everstep.wire.codecs.followed import FOLLOWED, split_accepted, split_result
from everstep.wire.codecs.proto import PROTOBUF
from tests.runtime.local import Local, batch

ACCEPT = {"accept": f"{FOLLOWED}, {PROTOBUF}"}
PATIENCE = 60.0
STEP: dict[str, Any] = {"adam_params": {"learning_rate": 0.01}}


def parts_of(body: bytes) -> tuple[str, tuple[str, bytes] | None]:
    """Return the request id of a body, and the result that follows."""
    parts = split_accepted(body)
    assert parts is not None
    return json.loads(parts[0])["request_id"], split_result(parts[1])


@pytest.mark.parametrize(
    ("route", "body", "media_type"),
    [
        ("forward_backward", {"forward_backward_input": batch(0)}, PROTOBUF),
        ("optim_step", STEP, "application/json"),
        ("optim_step", {"adam_params": {"learning_rate": "fast"}}, "application/json"),
    ],
    ids=["pass", "step", "refused"],
)
def test_result_follows_the_acceptance(
    home: Path, pico: Model, route: str, body: dict[str, Any], media_type: str
) -> None:
    with Local(home, pico) as service:
        run = service.new_run()
        answer = service.http.post(
            route, json={"model_id": run, "seq_id": 1, **body}, headers=ACCEPT
        )
        request_id, result = parts_of(answer.content)
        polled = service.poll(request_id, accept=PROTOBUF)
        again = service.http.post(
            route, json={"model_id": run, "seq_id": 1, **body}, headers=ACCEPT
        )
    assert answer.status_code == 200 and answer.headers["content-type"] == FOLLOWED
    assert result == (media_type, polled.content)
    assert again.content == answer.content, "a retry gets the same future and result"


def test_acceptance_comes_before_the_result(home: Path, pico: Model) -> None:
    accepted, sent = threading.Event(), []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 2:
            accepted.set()

    with Local(home, pico) as service:
        run = service.new_run()
        body = json.dumps({"model_id": run, "seq_id": 1, **STEP}).encode()

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/api/v1/optim_step",
            "raw_path": b"/api/v1/optim_step",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"accept", FOLLOWED.encode())],
            "client": ("testclient", 1),
            "server": ("test", 80),
        }
        portal = service.http.portal
        assert portal is not None
        with service.steps.shut():
            request = portal.start_task_soon(service.app, scope, receive, send)
            assert accepted.wait(PATIENCE)
            assert sent[1]["more_body"] and b"request_id" in sent[1]["body"]
        request.result(PATIENCE)
    _, result = parts_of(b"".join(each["body"] for each in sent[1:]))
    assert len(sent) == 3 and result is not None


def test_nothing_follows_an_operation_that_takes_longer_than_a_poll(
    home: Path, pico: Model
) -> None:
    with Local(home, pico, poll_seconds=0.05) as service:
        run = service.new_run()
        with service.steps.shut():
            body = {"model_id": run, "seq_id": 1, **STEP}
            answer = service.http.post("optim_step", json=body, headers=ACCEPT)
            request_id, result = parts_of(answer.content)
        assert result is None
        assert "metrics" in service.result(request_id)


def test_size_follows_in_place_of_a_large_result(
    home: Path, pico: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes_futures, "MAX_INLINE_BYTES", 10)
    with Local(home, pico) as service:
        run = service.new_run()
        body = {"model_id": run, "seq_id": 1, "forward_backward_input": batch(0)}
        answer = service.http.post("forward_backward", json=body, headers=ACCEPT)
    _, result = parts_of(answer.content)
    assert result is not None and json.loads(result[1])["status"] == "complete_metadata"


def test_refusal_is_an_error_as_ever(home: Path, pico: Model) -> None:
    with Local(home, pico) as service:
        body = {"model_id": "nobody", "seq_id": 1, **STEP}
        answer = service.http.post("optim_step", json=body, headers=ACCEPT)
    assert answer.status_code >= 400 and answer.headers["content-type"] == "application/json"
