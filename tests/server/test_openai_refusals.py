"""OpenAI-compatible errors: of a starting or busy service, and for unsupported requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import openai
import pytest

from everstep.engine import Model
from everstep.runtime import Runtime
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from tests.runtime.local import Local
from tests.runtime.test_samples import sampler, submit
from tests.scenario import MODEL

PROMPT = [69, 118, 101, 114]
CHAT: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def local(home: Path, pico: Model) -> Iterator[Local]:
    with Local(home, pico, max_inflight_samples=1) as service:
        write_tokenizer(home, MODEL, pico.tokenizer, pico.info.source)
        yield service


def client_of(local: Local) -> openai.OpenAI:
    return openai.OpenAI(
        base_url="http://test/v1", api_key="tml-local", http_client=local.http, max_retries=0
    )


@pytest.fixture
def client(local: Local) -> openai.OpenAI:
    return client_of(local)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "seed": 1}
    return client.completions.create(**asked | more)


def test_requests_wait_for_a_starting_service(home: Path, pico: Model) -> None:
    starting = Local(home, pico)
    waits, loaded = threading.Event(), Runtime.loaded

    async def wait(runtime: Runtime) -> None:
        waits.set()
        await loaded(runtime)

    with (
        mock.patch.object(Runtime, "loaded", wait),
        starting.loading.shut(),
        ThreadPoolExecutor(1) as pool,
        starting as service,
    ):
        write_tokenizer(home, MODEL, pico.tokenizer, pico.info.source)
        made = pool.submit(ask, client_of(service))
        made.add_done_callback(lambda _: waits.set())
        assert waits.wait(60)
        assert not made.done(), "it is answered when the models are loaded, and not before"
        starting.loading.open()
        assert made.result(60).choices[0].finish_reason == "length"


def test_busy_service_returns_retry_headers_and_draws_nothing(
    local: Local, client: openai.OpenAI
) -> None:
    name = sampler(local)
    with local.steps.shut():
        with pytest.raises(openai.RateLimitError, match="samples are queued or executing") as busy:
            ask(client, prompt=[PROMPT, PROMPT])  # only the first can be accepted
        assert busy.value.code == "rate_limit_exceeded"
        headers = busy.value.response.headers
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "1000")
        assert submit(local, name), "the first was cancelled"


@pytest.mark.parametrize("stream", [False, True])
def test_one_invalid_prompt_rejects_the_whole_request(
    local: Local, client: openai.OpenAI, stream: bool
) -> None:
    name = sampler(local)
    with local.steps.shut():
        with pytest.raises(openai.BadRequestError, match="99999") as wrong:
            ask(client, prompt=[PROMPT, [1, 99999]], stream=stream)
        assert wrong.value.type == "invalid_request_error"
        assert submit(local, name), "the right one is not drawn either"


def test_stream_with_echoed_logprobs_equals_the_whole_answer(
    client: openai.OpenAI,
) -> None:
    asked: dict[str, Any] = {"echo": True, "logprobs": 2, "n": 2}
    whole = ask(client, **asked)
    parts = [each.choices[0] for each in ask(client, **asked, stream=True) if each.choices]
    assert len(whole.choices) == 2
    for choice in whole.choices:
        mine = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        scored = [part.logprobs for part in mine if part.logprobs]
        scores = [score for each in scored for score in each.token_logprobs or []]
        assert scores == choice.logprobs.token_logprobs
        assert scores[0] is None and None not in scores[1:]
        tops = [top for each in scored for top in each.top_logprobs or []]
        assert tops == choice.logprobs.top_logprobs


def test_usage_is_only_in_the_last_part_of_a_stream(local: Local) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "seed": 1, "stream": True}
    options = {"stream_options": {"include_usage": True}}
    usages = []
    for asked in (body, body | options):
        answer = local.http.post("http://test/v1/completions", json=asked)
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        usages.append([json.loads(line.removeprefix("data: ")).get("usage", 0) for line in lines])
    assert set(usages[0]) == {0}
    *others, last = usages[1]
    assert set(others) == {None}
    assert last == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


def test_newer_chat_bound_takes_precedence(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_completion_tokens=2, max_tokens=9, seed=1
    )
    assert made.usage is not None and made.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("min_p", 0.1, 0.0),
        ("min_tokens", 3, 0),
        ("repetition_penalty", 1.2, 1.0),
        ("stop_token_ids", [7], []),
        ("ignore_eos", True, False),
        ("frequency_penalty", 0.5, 0.0),
        ("logit_bias", {"7": 1.0}, {}),
        ("suffix", "end", ""),
    ],
)
def test_unsupported_fields_are_rejected_by_name(
    client: openai.OpenAI, field: str, value: Any, neutral: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{field} is not supported here"):
        ask(client, extra_body={field: value})
    plain = ask(client).choices
    for nothing in (neutral, None):
        assert ask(client, extra_body={field: nothing}).choices == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {"a": 1}),
    ],
)
def test_unsupported_chat_fields_are_rejected_by_name(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{field} is not supported here"):
        client.chat.completions.create(model=MODEL, messages=CHAT, extra_body={field: value})


def test_model_without_a_template_is_rejected_with_the_alternative(
    client: openai.OpenAI, pico: Model
) -> None:
    with (
        mock.patch.object(pico.tokenizer, "chat_template", None),
        pytest.raises(openai.BadRequestError, match=r"no chat template\. Use /v1/completions"),
    ):
        client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=2)


def test_tokenizer_without_a_file_is_rejected_with_the_alternative(client: openai.OpenAI) -> None:
    with (
        mock.patch("everstep.runtime.sampling.openai.decoder_file", return_value=None),
        pytest.raises(openai.BadRequestError, match="Sample tokens over the Tinker protocol"),
    ):
        ask(client)


def test_unknown_role_or_content_is_rejected(client: openai.OpenAI) -> None:
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="content"):
        client.chat.completions.create(model=MODEL, messages=image, max_tokens=2)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=MODEL, messages=[], max_tokens=2)
