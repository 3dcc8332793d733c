"""OpenAI-compatible API, through the official ``openai`` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import everstep
from tests.conftest import Service
from tests.scenario import MODEL, connect, train

pytestmark = pytest.mark.slow
PROMPT = "Every step"
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="tml-local") as opened:
        yield opened


@pytest.fixture(scope="module")
def tinker(service: Service) -> Iterator[everstep.ServiceClient]:
    with connect(everstep, service.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def checkpoint(tinker: everstep.ServiceClient) -> str:
    """A sampler checkpoint of a trained run."""
    run = tinker.create_lora_training_client(MODEL, rank=4, seed=1).result()
    train(everstep, run, 3)
    path = run.save_weights_for_sampler("openai").result().path
    assert path is not None
    return path


def sampled(
    tinker: everstep.ServiceClient, tokens: list[int], **params: Any
) -> everstep.SampleResponse:
    """Return the text that the Tinker protocol samples for a prompt."""
    model = params.pop("model", MODEL)
    source = {"model_path": model} if model.startswith("tinker://") else {"base_model": model}
    sampler = tinker.create_sampling_client(**source).result()
    return sampler.sample(
        everstep.ModelInput.from_ints(tokens), 1, everstep.SamplingParams(**params)
    ).result()


def test_models_list_base_models_and_checkpoints(client: openai.OpenAI, checkpoint: str) -> None:
    found = {model.id: model for model in client.models.list()}
    assert MODEL in found
    assert checkpoint in found
    assert client.models.retrieve(checkpoint).created == found[checkpoint].created
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve(checkpoint + "x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/nothing")


@pytest.mark.parametrize("of", ["base", "checkpoint"])
def test_completion_equals_a_sample_of_the_tinker_protocol(
    client: openai.OpenAI, tinker: everstep.ServiceClient, checkpoint: str, of: str
) -> None:
    model = MODEL if of == "base" else checkpoint
    tokens = list(PROMPT.encode())
    expected = sampled(tinker, tokens, model=model, max_tokens=12, seed=7).sequences[0]
    text = bytes(t for t in expected.tokens if t < 256).decode(errors="replace")
    for prompt in (PROMPT, tokens):
        made = client.completions.create(model=model, prompt=prompt, max_tokens=12, seed=7)
        assert made.choices[0].text == text
        assert made.choices[0].finish_reason == expected.stop_reason
        assert made.usage is not None
        assert made.usage.prompt_tokens == len(tokens)
        assert made.usage.completion_tokens == len(expected.tokens)


def test_several_prompts_and_choices_keep_their_order(client: openai.OpenAI) -> None:
    prompts = ["One", "Two", "Three"]
    together = client.completions.create(model=MODEL, prompt=prompts, n=2, seed=3, max_tokens=8)
    assert [choice.index for choice in together.choices] == list(range(6))
    for index, prompt in enumerate(prompts):
        alone = client.completions.create(model=MODEL, prompt=prompt, n=2, seed=3, max_tokens=8)
        mine = together.choices[2 * index : 2 * index + 2]
        assert [choice.text for choice in mine] == [choice.text for choice in alone.choices]


def test_echoed_prompt_has_the_logprobs_of_the_tinker_protocol(
    client: openai.OpenAI, tinker: everstep.ServiceClient
) -> None:
    """Evaluation harnesses request a text's likelihood without drawing anything."""
    tokens = list(PROMPT.encode())
    made = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2
    )
    choice = made.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    sampler = tinker.create_sampling_client(base_model=MODEL).result()
    expected = sampler.compute_logprobs(everstep.ModelInput.from_ints(tokens)).result()
    assert choice.logprobs.token_logprobs == expected
    assert choice.logprobs.tokens == list(PROMPT)
    assert choice.logprobs.text_offset == list(range(len(PROMPT)))
    tops = choice.logprobs.top_logprobs
    assert tops is not None
    assert tops[0] is None
    assert len(tops) == len(tokens) > 1
    assert all(len(top) >= 2 for top in tops[1:] if top is not None)
    assert None not in tops[1:]


def test_completion_excludes_its_stop_string(client: openai.OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, seed=5)
    text = free.choices[0].text
    stop = next(c for c in text[5:] if c.isascii() and c.isprintable() and c not in text[:5])
    stopped = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=40, seed=5, stop=[stop, "never said"]
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_chat_uses_the_models_template(
    client: openai.OpenAI, tinker: everstep.ServiceClient, checkpoint: str
) -> None:
    prompt = "system: Be brief.\nuser: Hello\nassistant: "
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for content in ("Hello", parts):
        messages: Any = [CHAT[0], {"role": "user", "content": content}]
        made = client.chat.completions.create(
            model=checkpoint, messages=messages, max_completion_tokens=9, seed=2
        )
        expected = client.completions.create(model=checkpoint, prompt=prompt, max_tokens=9, seed=2)
        assert made.choices[0].message.content == expected.choices[0].text
        assert made.choices[0].message.role == "assistant"
        assert made.usage == expected.usage


def test_chat_logprobs_belong_to_its_tokens(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=6, seed=2, logprobs=True, top_logprobs=3
    )
    assert made.choices[0].logprobs is not None
    content = made.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_streamed_parts_join_to_the_whole_answer(client: openai.OpenAI, checkpoint: str) -> None:
    asked: dict[str, Any] = {
        "model": checkpoint,
        "prompt": [PROMPT, "Another"],
        "n": 2,
        "max_tokens": 20,
        "seed": 11,
        "logprobs": 1,
        "stop": ["e"],
    }
    whole = client.completions.create(**asked)
    parts = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert len(whole.choices) == 4
    for choice in whole.choices:
        mine = [p.choices[0] for p in parts if p.choices and p.choices[0].index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        reasons = [each.finish_reason for each in mine]
        assert reasons == [*[None] * (len(mine) - 1), choice.finish_reason]
        assert choice.logprobs is not None
        streamed = [x for each in mine if each.logprobs for x in each.logprobs.tokens or []]
        assert streamed == choice.logprobs.tokens


def test_chat_can_be_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 30, "seed": 4}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(**asked, stream=True) as stream:
        parts = [part.choices[0] for part in stream]
    assert parts[0].delta.role == "assistant"
    text = "".join(part.delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert len([part for part in parts if part.delta.content]) > 5
    assert parts[-1].finish_reason == whole.choices[0].finish_reason


async def _gather(base_url: str) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=base_url, api_key="tml-local") as client:
        made = await asyncio.gather(
            *(
                client.completions.create(model=MODEL, prompt=PROMPT, seed=seed, max_tokens=10)
                for seed in (1, 2, 1, 2)
            )
        )
    return [each.choices[0].text for each in made]


def test_concurrent_requests_equal_single_ones(client: openai.OpenAI, service: Service) -> None:
    import asyncio

    found = asyncio.run(_gather(f"{service.url}/v1"))
    alone = [
        client.completions.create(model=MODEL, prompt=PROMPT, seed=seed, max_tokens=10)
        for seed in (1, 2)
    ]
    assert found == [each.choices[0].text for each in alone] * 2


def test_retry_with_the_same_key_draws_nothing_again(service: Service) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5}
    headers = {"Idempotency-Key": "once", "Authorization": "Bearer tml-local"}
    first, second = (
        httpx.post(f"{service.url}/v1/completions", json=body, headers=headers, timeout=60).json()
        for _ in range(2)
    )
    assert first["id"] == second["id"]
    assert first["choices"] == second["choices"]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"model": "nobody/nothing"}, openai.NotFoundError, "not served here"),
        ({"model": "tinker://no:train:0/weights/x"}, openai.NotFoundError, "does not exist"),
        ({"model": "tinker://no"}, openai.NotFoundError, "path"),
        ({"prompt": []}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": ""}, openai.BadRequestError, "prompt is empty"),
        ({"prompt": [1, 99999]}, openai.BadRequestError, "99999"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context window: 10 \\+ 5000 > 2048"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix is not supported"),
        ({"best_of": 3}, openai.BadRequestError, "best_of other than n"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ],
)
def test_invalid_requests_are_rejected_with_the_reason(
    client: openai.OpenAI, wrong: dict[str, Any], error: type[openai.APIStatusError], says: str
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, **wrong}
    with pytest.raises(error, match=f"(?i){says}") as raised:
        client.completions.create(**asked)
    assert raised.value.body is not None
    assert raised.value.type == "invalid_request_error"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_chat_without_tokens_is_rejected(client: openai.OpenAI, field: str) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, field: 0}
    with pytest.raises(openai.BadRequestError, match=f"{field}: .* greater than or equal to 1"):
        client.chat.completions.create(**asked)
    made = client.chat.completions.create(**{**asked, field: 1})
    assert made.usage is not None
    assert made.usage.completion_tokens == 1


def test_tools_are_rejected_rather_than_ignored(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model=MODEL, messages=CHAT, tools=[tool])


def test_fields_without_effect_are_accepted(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        max_tokens=2,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        response_format={"type": "text"},
        frequency_penalty=0,
    )
    assert made.object == "chat.completion"


def test_stream_ends_like_openais(service: Service) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert len(lines) > 1
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["id"] for line in lines[:-1])


def test_disconnect_cancels_the_samples(service: Service, client: openai.OpenAI) -> None:
    """The client disconnects mid-stream. The sample's future fails as cancelled."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2000, "stream": True, "n": 8}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as answer:
        line = next(line for line in answer.iter_lines() if line)
    made = json.loads(line.removeprefix("data: "))["id"].removeprefix("cmpl-")
    asked = {"request_id": made, "allow_metadata_only": False}
    ended = httpx.post(f"{service.url}/api/v1/retrieve_future", json=asked, timeout=60)
    assert "cancelled" in ended.json()["error"]


def test_disconnect_with_a_key_keeps_the_samples(service: Service) -> None:
    """A lost connection looks like a disconnect. The retry gets the same samples."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 200, "seed": 3}
    headers, url = {"Idempotency-Key": "back"}, f"{service.url}/v1/completions"
    stream = body | {"stream": True}
    with httpx.stream("POST", url, json=stream, headers=headers, timeout=60) as answer:
        line = next(line for line in answer.iter_lines() if line)
    again = httpx.post(url, json=body, headers=headers, timeout=60).json()
    assert again["id"] == json.loads(line.removeprefix("data: "))["id"]
    assert again["choices"] == httpx.post(url, json=body, timeout=60).json()["choices"]


@pytest.mark.long(reason="two starts of a real service, with a SIGKILL between them")
def test_answer_survives_the_service(tmp_path: Path) -> None:
    """Accepted samples are drawn after a SIGKILL, and a retry with the key gets them."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 300, "seed": 1}
    headers = {"Idempotency-Key": "kept"}
    first = Service(tmp_path / "home")
    stream = {**body, "stream": True}
    path = "/v1/completions"
    with httpx.stream("POST", first.url + path, json=stream, headers=headers, timeout=60) as answer:
        line = next(line for line in answer.iter_lines() if line)
        first.kill()
    second = Service(tmp_path / "home")
    try:
        kept = httpx.post(second.url + path, json=body, headers=headers, timeout=60).json()
        repeated = httpx.post(second.url + path, json=body, timeout=60).json()
    finally:
        second.stop()
    assert kept["id"] == json.loads(line.removeprefix("data: "))["id"]
    assert kept["choices"] == repeated["choices"]
