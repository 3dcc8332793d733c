"""Paths of the hosted service: they answer as ours do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from everstep.engine import Model
from tests.runtime.local import Local
from tests.scenario import MODEL

BODY = {"model": "x", "prompt": "a", "max_tokens": 2}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    with Local(tmp_path_factory.mktemp("service"), pico) as opened:
        yield opened


PREFIXES = ["/v1", "/oai/api/v1", "/services/tinker-prod/oai/api/v1"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_openai_routes_answer_under_every_prefix(local: Local, prefix: str) -> None:
    models = local.http.get(f"http://test{prefix}/models").json()["data"]
    assert MODEL in [model["id"] for model in models]
    unknown = local.http.post(f"http://test{prefix}/completions", json=BODY)
    assert unknown.status_code == 404
    assert "'x' is not served here" in unknown.json()["error"]["message"]
    assert "--model x=DIRECTORY" in unknown.json()["error"]["message"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_responses_api_says_that_it_is_not_served(local: Local, prefix: str) -> None:
    answer = local.http.post(f"http://test{prefix}/responses", json={"model": MODEL, "input": "a"})
    assert answer.status_code == 404
    assert "Use chat completions" in answer.json()["error"]["message"]


def test_protocol_answers_under_the_hosted_prefix(local: Local) -> None:
    answer = local.http.get("http://test/services/tinker-prod/api/v1/healthz")
    assert answer.json() == {"status": "ok"}
    assert local.http.get("http://test/services/other/api/v1/healthz").status_code == 404
