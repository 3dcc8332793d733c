"""Numbers in headers, queries and bodies: any text is answered with its fault, never with 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from everstep.engine import Model
from everstep.interchange.peft_config import ADAPTER
from everstep.server.ranges import Unsatisfiable, requested
from tests.runtime.local import Local
from tests.runtime.test_samples import sampler, submit

LONG = "9" * 5000
ODD = [LONG, "-1", "1e3", "0x1", "1_000", "٣", "²", "+1", " ", "NaN", str(2**63), str(2**200)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("numbers"), pico) as service:
        yield service


@pytest.fixture(scope="module")
def request_id(local: Local) -> str:
    made = submit(local, sampler(local))
    local.result(made)
    return made


def status(local: Local, method: str, path: str, **options: Any) -> int:
    answer = local.http.request(method, path, **options)
    assert answer.status_code < 400 or answer.json()["detail"]
    return int(answer.status_code)


@pytest.mark.parametrize("text", [each for each in ODD if each.strip()])
def test_event_id_that_is_no_position_is_rejected(local: Local, request_id: str, text: str) -> None:
    path = f"everstep/samples/{request_id}/events"
    headers = {b"last-event-id": text.encode()}
    assert status(local, "GET", path, headers=headers) == 400
    assert status(local, "GET", path, headers={"last-event-id": "1"}) == 200
    assert status(local, "GET", path, headers={"last-event-id": ""}) == 200


@pytest.mark.parametrize("text", [LONG, "-1", "²", str(2**63), str(2**200)])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sessions", "limit"),
        ("sessions", "offset"),
        ("training_runs", "offset"),
        ("checkpoints", "limit"),
        ("audit", "cursor"),
        ("audit", "limit"),
        ("everstep/checkpoints/import", "step"),
    ],
)
def test_number_of_a_query_is_rejected(local: Local, path: str, name: str, text: str) -> None:
    method = "POST" if path.endswith("import") else "GET"
    assert status(local, method, path, params={name: text}) == 400


@pytest.mark.parametrize("text", ODD)
def test_release_of_a_client_may_be_any_text(local: Local, text: str) -> None:
    headers = {b"x-stainless-package-version": f"{text}.{text}".encode()}
    assert status(local, "GET", "checkpoints", headers=headers) == 200
    body = {"sdk_version": f"{text}.{text}"}
    assert status(local, "POST", "client/config", json=body) == 200


@pytest.mark.parametrize("number", ["1e308", "1e400", LONG, str(2**63), "-1", "NaN"])
@pytest.mark.parametrize(
    ("path", "field", "more"),
    [
        ("everstep/vault/collect", "grace_seconds", {}),
        ("everstep/vault/prune", "ttl_seconds", {"run_id": "x", "keep_last": 1}),
        ("everstep/vault/prune", "keep_last", {"run_id": "x"}),
        ("everstep/weights_access_tokens", "ttl_seconds", {"tinker_path": "tinker://a/weights/b"}),
        ("sessions/search", "limit", {}),
        ("retrieve_futures", "timeout", {"target": {"sampling_session_id": "x"}}),
    ],
)
def test_number_of_a_body_is_rejected(
    local: Local, path: str, field: str, more: dict[str, Any], number: str
) -> None:
    body = json.dumps({**more, field: 0}).replace(f'"{field}": 0', f'"{field}": {number}')
    assert number in body
    assert status(local, "POST", path, content=body.encode()) in (400, 404)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{" * 100_000])
def test_metadata_of_any_depth_is_rejected(local: Local, text: str) -> None:
    query = {"user_metadata": text[:15_000]}
    assert status(local, "POST", "everstep/checkpoints/import", params=query) == 400


@pytest.mark.parametrize(
    "path", ["optim_step", "create_session", "forward", "everstep/vault/collect"]
)
def test_body_of_any_depth_is_rejected(local: Local, path: str) -> None:
    for start in ('{"model_id": "x", "seq_id": 1, "a": ', ""):
        for text in ("[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000):
            assert status(local, "POST", path, content=(start + text).encode()) == 400


def test_signed_url_with_another_expiry_is_rejected(local: Local) -> None:
    for text in ODD:
        signed = {"expires": text, "signature": "0" * 64}
        assert status(local, "GET", "everstep/traces/x.json", params=signed) == 403
        query = {**signed, "tag": "0"}
        path = f"everstep/downloads/r/weights/n/{ADAPTER}"
        assert status(local, "GET", path, params=query) in (403, 404)


def test_long_range_ends_with_the_content() -> None:
    assert requested({"range": f"bytes=2-{LONG}"}, '"tag"', 10) == (2, 10)
    assert requested({"range": f"bytes=-{LONG}"}, '"tag"', 10) == (0, 10)
    assert requested({"range": f"bytes=0{'0' * 5000}2-4"}, '"tag"', 10) == (2, 5)
    with pytest.raises(Unsatisfiable):
        requested({"range": f"bytes={LONG}-"}, '"tag"', 10)


def test_range_in_other_digits_is_ignored() -> None:
    assert requested({"range": "bytes=٣-٤"}, '"tag"', 10) is None
