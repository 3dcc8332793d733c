"""Odd requests on every route: whatever a field holds, the answer says what is wrong, never 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest

from everstep.engine import Model
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from tests.runtime.local import Local
from tests.scenario import MODEL

TEXTS = [
    "",
    " ",
    "..",
    "%00",
    "a/b",
    "\0",
    "é\n",
    "🦊" * 50,
    "9" * 5000,
    "tinker://a/weights/b",
    "x:0",
]
RAW = [
    "null",
    "true",
    "-1",
    "1e308",
    "1e400",
    "NaN",
    "9" * 400,
    "9" * 5000,
    str(2**64),
    '""',
    '"\\ud800"',
    '"\\u0000"',
    '"x"',
    "[]",
    "{}",
    "[[[]]]",
    '{"a": [{"b": null}]}',
    "[" * 300 + "]" * 300,
]
"""Values of JSON as text, also those that no encoder writes."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    home = tmp_path_factory.mktemp("odd")
    with Local(home, pico, poll_seconds=0) as service:
        write_tokenizer(home, MODEL, pico.tokenizer, pico.info.source)
        with mock.patch.object(service.http._transport, "raise_server_exceptions", False):
            yield service


def routes(local: Local) -> list[tuple[str, str, dict[str, Any]]]:
    described = local.app.openapi()["paths"]
    found = [(m, p, route) for p, methods in described.items() for m, route in methods.items()]
    assert len(found) > 60
    return found


def check(local: Local, method: str, url: str, **options: Any) -> None:
    answer = local.http.request(method, f"http://test{url}", **options)
    sent = f"{method} {url[:200]} {str(options)[:300]}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code < 500, sent
    if answer.status_code >= 400 and answer.status_code != 408 and method != "head":
        said = answer.json()
        assert said["error"]["message"] if url.startswith("/v1/") else said["detail"], sent


def fill(path: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        path = path.replace(f"{{{name}}}", quote(value, safe="").replace(".", "%2E"))
    return path


def parameters(route: dict[str, Any], place: str) -> list[str]:
    return [each["name"] for each in route.get("parameters", []) if each["in"] == place]


def test_any_text_in_a_path_is_answered(local: Local) -> None:
    for method, path, route in routes(local):
        for name in (names := parameters(route, "path")):
            for text in TEXTS:
                check(local, method, fill(path, dict.fromkeys(names, "x") | {name: text}))


def test_any_text_in_a_query_is_answered(local: Local) -> None:
    for method, path, route in routes(local):
        url = fill(path, dict.fromkeys(parameters(route, "path"), "x"))
        for name in parameters(route, "query"):
            for text in TEXTS:
                check(local, method, url, params={name: text})


def test_any_text_in_a_header_is_answered(local: Local) -> None:
    texts = [text.encode() for text in TEXTS if "\n" not in text]
    for method, path, route in routes(local):
        url = fill(path, dict.fromkeys(parameters(route, "path"), "x"))
        if method == "get" and route.get("tags") == ["futures"]:
            continue
        for name in [*parameters(route, "header"), "content-encoding", "content-type"]:
            for text in texts[:4]:
                check(local, method, url, headers={name.encode(): text}, content=b"{}")


def fields(local: Local, route: dict[str, Any]) -> list[str]:
    content = route.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return []
    schemas = local.app.openapi()["components"]["schemas"]
    schema = schemas[content["schema"]["$ref"].rpartition("/")[2]]
    return list(schema.get("properties", {}))


REQUIRED: dict[str, Any] = {
    "model": MODEL,
    "prompt": "x",
    "messages": [{"role": "user", "content": "x"}],
    "model_id": "x",
    "seq_id": 1,
    "session_id": "x",
    "max_tokens": 1,
}


def test_any_value_in_a_body_is_answered(local: Local) -> None:
    for method, path, route in routes(local):
        url = fill(path, dict.fromkeys(parameters(route, "path"), "x"))
        names = fields(local, route)
        whole = {name: value for name, value in REQUIRED.items() if name in names}
        for name in names:
            others = {key: value for key, value in whole.items() if key != name}
            start = json.dumps(others)[:-1] + (", " if others else "")
            for value in RAW:
                check(local, method, url, content=f'{start}"{name}": {value}}}'.encode())
