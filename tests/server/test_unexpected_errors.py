"""Errors that nobody foresaw: in the API's own form, and as an event once a stream began."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.engine import Model
from everstep.server.openai.choices import Choice
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from tests.runtime.local import Local
from tests.runtime.test_samples import sampler, submit
from tests.scenario import MODEL

BODY: dict[str, Any] = {"model": MODEL, "prompt": [69, 118], "max_tokens": 3, "seed": 1}


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico) as service:
        write_tokenizer(home, MODEL, pico.tokenizer, pico.info.source)
        with mock.patch.object(service.http._transport, "raise_server_exceptions", False):
            yield service


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/nobody%2Fnothing", 404),
    ],
)
def test_every_error_of_the_openai_api_has_its_form(
    local: Local, method: str, path: str, status: int
) -> None:
    answer = local.http.request(method, f"http://test{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_body_of_any_depth_is_a_400_of_the_openai_api(local: Local, path: str) -> None:
    for body in (b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "x", "a": ' + b"[" * 100_000):
        answer = local.http.post(f"http://test/v1/{path}", content=body)
        assert answer.status_code == 400
        assert "not JSON" in answer.json()["error"]["message"]


def test_unexpected_error_has_the_form_of_the_openai_api(local: Local) -> None:
    with mock.patch.object(Choice, "push", side_effect=RuntimeError("odd output")):
        answer = local.http.post("http://test/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "odd output" not in answer.text


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_error_in_a_stream_is_an_event(local: Local, path: str) -> None:
    body = {**BODY, "stream": True}
    if path == "chat/completions":
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "Hi"}]
    with mock.patch.object(Choice, "push", side_effect=RuntimeError("odd output")):
        answer = local.http.post(f"http://test/v1/{path}", json=body)
    assert answer.status_code == 200
    last = [line for line in answer.text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_error_in_a_sample_stream_is_its_last_event(local: Local) -> None:
    request_id = submit(local, sampler(local))
    local.result(request_id)
    with mock.patch(
        "everstep.server.conversion.json_result_bytes", side_effect=RuntimeError("odd")
    ):
        answer = local.http.get(f"everstep/samples/{request_id}/events")
    assert answer.status_code == 200
    event, data = [line for line in answer.text.splitlines() if line][-2:]
    assert event == "event: failed"
    assert json.loads(data.removeprefix("data: "))["category"] == "server"
