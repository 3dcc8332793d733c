"""OpenAI-compatible requests: every field is honoured, or refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from everstep.engine import Model
from everstep.worker.protocol.tokenizer_files import write_tokenizer
from tests.runtime.local import Local
from tests.scenario import MODEL

WRITES_CALLS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.reasoning_content or '' }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>"
    "{% endfor %}|{% endfor %}{% if shout %}!{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m.content }}"
    "{% endfor %}"
)
ASKS: dict[str, Any] = {"role": "user", "content": "Oslo?"}
CALLS: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "refusal": None,
    "annotations": [],
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Oslo", "day": null}'},
        }
    ],
}
ANSWERS: dict[str, Any] = {"role": "tool", "tool_call_id": "c1", "content": "4"}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, pico: Model) -> Iterator[Local]:
    home: Path = tmp_path_factory.mktemp("messages")
    with Local(home, pico) as service:
        write_tokenizer(home, MODEL, pico.tokenizer, pico.info.source)
        yield service


@pytest.fixture
def template(pico: Model) -> Iterator[None]:
    """A template that writes calls, while a test runs."""
    with mock.patch.object(pico.tokenizer, "chat_template", WRITES_CALLS):
        yield


def post(local: Local, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    body = {"model": MODEL, "max_tokens": 1, **fields}
    return local.http.post(f"http://test{path}", json=body)


def refusal(answer: Any) -> str:
    """The text of an answer that refuses the request."""
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    return str(answer.json()["error"]["message"])


def prompt_size(local: Local, *messages: dict[str, Any], **fields: Any) -> int:
    answer = post(local, messages=messages, **fields)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens"])


@pytest.mark.usefixtures("template")
def test_calls_of_a_history_are_written_by_the_template(local: Local) -> None:
    text = 'user: Oslo?|assistant: <weather {"city": "Oslo", "day": null}>|tool: 4|'
    assert prompt_size(local, ASKS, CALLS, ANSWERS) == len(text)
    call = CALLS["tool_calls"][0]
    arguments = {"city": "Oslo", "day": None}
    as_object = {**call, "function": {"name": "weather", "arguments": arguments}}
    assert prompt_size(local, ASKS, {**CALLS, "tool_calls": [as_object]}, ANSWERS) == len(text)


def test_calls_that_the_template_does_not_write_are_refused_by_name(local: Local) -> None:
    said = refusal(post(local, messages=[ASKS, CALLS, ANSWERS]))
    assert said == (
        f"Model {MODEL}: the chat template does not write 'tool_calls' of messages[1] (role "
        "'assistant')"
    )


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({**ASKS, "name": "ann"}, "'name' of messages[0]"),
        ({**ASKS, "weight": 1}, "'weight' of messages[0]"),
        ({**ASKS, "function_call": {"name": "f"}}, "'function_call' of messages[0]"),
        ({**ASKS, "reasoning_content": "R"}, "'reasoning_content' of messages[0]"),
        ({**ASKS, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        ({**ASKS, "content": [{"type": "text", "text": "x", "y": 1}]}, "y is not supported"),
        ({**ASKS, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "JSON text"),
        ({"content": "x"}, "role"),
    ],
)
def test_field_of_a_message_that_is_not_honoured_is_refused(
    local: Local, message: dict[str, Any], says: str
) -> None:
    assert says in refusal(post(local, messages=[message]))


@pytest.mark.usefixtures("template")
def test_field_that_the_template_writes_is_honoured(local: Local) -> None:
    plain = prompt_size(local, ASKS, {"role": "assistant", "content": "4"})
    more = {"role": "assistant", "content": "4", "reasoning_content": "R"}
    assert prompt_size(local, ASKS, more) == plain + 1
    shouted = prompt_size(local, ASKS, chat_template_kwargs={"shout": True})
    assert shouted == prompt_size(local, ASKS) + 1


def test_words_of_a_template_that_refuses_are_told(local: Local, pico: Model) -> None:
    with mock.patch.object(pico.tokenizer, "chat_template", ALTERNATES):
        said = refusal(post(local, messages=[ASKS, ASKS]))
        assert "refuses this conversation: Conversation roles must alternate" in said
        assert post(local, messages=[ASKS]).status_code == 200
    with mock.patch.object(pico.tokenizer, "chat_template", "{{ messages[0].x.y }}"):
        assert "UndefinedError: " in refusal(post(local, messages=[ASKS]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"temprature": 0.5}, "temprature is not supported here"),
        ({"guided_json": {"type": "object"}}, "guided_json is not supported here"),
        ({"skip_special_tokens": False}, "skip_special_tokens is not supported here"),
        ({"add_generation_prompt": False}, "add_generation_prompt is not supported here"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not supported here"),
        ({"verbosity": "low"}, "verbosity is not supported here"),
        ({"tool_choice": "required"}, "tool_choice is not supported here"),
        ({"top_logprobs": 2}, "top_logprobs without logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options without stream"),
        ({"stream": True, "stream_options": {"usages": 1}}, "usages is not supported here"),
        ({"response_format": {"type": "text", "schema": {"a": 1}}}, "schema is not supported"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "does not read 'enable_thinking'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize' is no variable"),
    ],
)
def test_unknown_chat_field_is_refused_by_name(
    local: Local, fields: dict[str, Any], says: str
) -> None:
    assert says in refusal(post(local, messages=[ASKS], **fields))


def test_unknown_completion_field_is_refused_by_name(local: Local) -> None:
    for field in ("messages", "tools", "echos", "use_beam_search"):
        answer = post(local, "/v1/completions", prompt="a", **{field: [1]})
        assert f"{field} is not supported here" in refusal(answer)


def test_fields_without_effect_and_empty_ones_are_accepted(local: Local) -> None:
    without_effect: dict[str, Any] = {
        "user": "somebody",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "temprature": None,
        "extra": {},
    }
    cached = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    messages = [{**ASKS, "content": [cached], "name": None, "audio": None}]
    assert post(local, messages=messages, **without_effect).status_code == 200
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert post(local, messages=messages, **options).status_code == 200


def test_body_may_have_a_byte_order_mark(local: Local) -> None:
    body = f'\ufeff{{"model": "{MODEL}", "prompt": "a", "max_tokens": 1}}'.encode()
    assert local.http.post("http://test/v1/completions", content=body).status_code == 200


def test_half_of_a_character_is_refused(local: Local) -> None:
    body = rf'{{"model": "{MODEL}", "prompt": "\ud800", "max_tokens": 1}}'.encode()
    answer = local.http.post("http://test/v1/completions", content=body)
    assert "The body is not JSON" in refusal(answer)
