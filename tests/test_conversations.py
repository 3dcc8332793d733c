"""Conversations: what a chat template writes, and what it is refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from everstep.conversations import (
    ConversationError,
    check_written,
    encode_rendered,
    error_words,
    read_messages,
    render,
    without_mark,
)
from tests.cli.byte_tokenizer import ByteTokenizer
from tests.tiny_tokenizers import byte_level, tokenizer_of

WRITES_CALLS = (
    "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}"
    "{% for m in messages %}<s>{{ m.role }}: "
    "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ ARGUMENTS }}{% endfor %}"
    "</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}{% if shout %}!{% endif %}"
)
TEXT = '{"city": "Oslo", "n": 1}'
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": TEXT}}
ASKS = {"role": "user", "content": "Q"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWERS = {"role": "tool", "content": "4", "tool_call_id": "c1"}
TEMPLATES = {
    "as JSON": WRITES_CALLS.replace("ARGUMENTS", "c.function.arguments | tojson"),
    "as they are": WRITES_CALLS.replace("ARGUMENTS", "c.function.arguments"),
    "joined": WRITES_CALLS.replace("ARGUMENTS", "'' + c.function.arguments + ''"),
    "strung": WRITES_CALLS.replace("ARGUMENTS", "'' ~ c.function.arguments"),
}
PLAIN = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant', 'tool'] %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endif %}{% endfor %}"
)


def tokenizer(template: str) -> Any:
    return tokenizer_of(byte_level, template)


def check(template: str, *messages: dict[str, Any], **variables: Any) -> None:
    """Read messages and check that the template writes them."""
    read = read_messages(messages)
    check_written(tokenizer(template), read, reply=True, variables=variables)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("arguments", [TEXT, json.loads(TEXT)], ids=["text", "object"])
def test_arguments_of_calls_are_written_as_json(template: str, arguments: Any) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}

    text = render(
        tokenizer(template), read_messages([ASKS, {**CALLS, "tool_calls": [call]}]), reply=True
    )

    assert text == f"<s>user: Q</s><s>assistant: weather{TEXT}</s><s>assistant: "


@pytest.mark.parametrize("arguments", ["", "{}", None, {}])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_call_without_arguments_is_written(template: str, arguments: Any) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    text = render(
        tokenizer(template), read_messages([{**CALLS, "tool_calls": [call]}]), reply=False
    )
    assert text in ("<s>assistant: f{}</s>", "<s>assistant: f</s>")


def test_text_that_looks_like_arguments_changes_nothing() -> None:
    asks = {"role": "user", "content": str(json.loads(TEXT))}
    text = render(tokenizer(TEMPLATES["as JSON"]), read_messages([asks, CALLS]), reply=False)
    assert f"weather{TEXT}" in text


@pytest.mark.parametrize("arguments", ["{", "[1]", "7", "null", 7, "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(arguments: Any) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ConversationError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arg"):
        read_messages([ASKS, {**CALLS, "tool_calls": [call]}])


def test_template_that_writes_calls_is_accepted() -> None:
    both = {**CALLS, "content": "Let me see."}
    check(TEMPLATES["as JSON"], ASKS, CALLS, ANSWERS, ASKS, both)
    check(TEMPLATES["as JSON"], ASKS, CALLS, {**ANSWERS, "name": "weather"})
    check(TEMPLATES["as JSON"], ASKS, tools=[{"type": "function"}], shout=True)


SAYS = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("messages", "variables", "says"),
    [
        ([ASKS, CALLS, ANSWERS], {}, r"'tool_calls' of messages\[1\] \(role 'assistant'\)"),
        ([{**ASKS, "name": "ann"}], {}, r"'name' of messages\[0\] \(role 'user'\)"),
        ([ASKS, {**SAYS, "reasoning_content": "R"}], {}, r"'reasoning_content' of messages\[1\]"),
        ([ASKS, {**SAYS, "refusal": "No."}], {}, r"'refusal' of messages\[1\]"),
        ([ASKS, {**SAYS, "weight": 0}], {}, r"'weight' of messages\[1\]"),
        ([{"role": "system", "content": "S"}, ASKS], {}, r"'content' of messages\[0\] \(role 'sys"),
        ([ASKS, {"role": "tool", "content": "4", "tool_call_id": "c9"}], {}, r"'tool_call_id' of"),
        ([ASKS], {"tools": [{"type": "function"}]}, "does not write 'tools'"),
        ([ASKS], {"enable_thinking": False}, "does not read 'enable_thinking'"),
        ([ASKS], {"tokenize": True}, "'tokenize' is no variable of a template"),
        ([ASKS], {"add_generation_prompt": False}, "'add_generation_prompt' is no variable"),
        ([ASKS], {"chat_template": "x"}, "'chat_template' is no variable"),
    ],
)
def test_what_a_template_does_not_write_is_refused_by_name(
    messages: list[dict[str, Any]], variables: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConversationError, match=says):
        check(PLAIN, *messages, **variables)


def test_results_out_of_order_need_a_template_that_writes_ids() -> None:
    calls = {**CALLS, "tool_calls": [CALL, {**CALL, "id": "c2"}]}
    second = {**ANSWERS, "tool_call_id": "c2"}
    check(TEMPLATES["as JSON"], ASKS, calls, ANSWERS, second)
    with pytest.raises(ConversationError, match=r"'tool_call_id' of messages\[2\]"):
        check(TEMPLATES["as JSON"], ASKS, calls, second, ANSWERS)
    check(
        TEMPLATES["as JSON"].replace("m.content", "m.tool_call_id, m.content"), ASKS, calls, second
    )


def test_earlier_reasoning_may_be_left_out_by_a_template_that_knows_it() -> None:
    check(TEMPLATES["as JSON"], ASKS, {**SAYS, "reasoning_content": "R"}, ASKS)


def test_content_beside_calls_has_to_be_written() -> None:
    only = PLAIN.replace("{{ m.content }}", "{{ m.tool_calls or m.content }}")
    check(only, ASKS, CALLS)
    with pytest.raises(ConversationError, match=r"'content' of messages\[1\]"):
        check(only, ASKS, {**CALLS, "content": "Let me see."})


def test_system_message_that_is_a_templates_default_is_written() -> None:
    default = "{% if messages[0].role != 'system' %}<s>system: S</s>{% endif %}" + PLAIN.replace(
        "'tool'", "'system'"
    )
    check(default, {"role": "system", "content": "S"}, ASKS)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "conversation: roles must alternate"),
        ("{{ messages[0]['x']['y'] }}", "UndefinedError: 'dict object' has no attribute 'x'"),
        ("{{ 1 + messages[0].content }}", "TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for %}", "TemplateSyntaxError"),
    ],
)
def test_error_of_a_template_is_told_in_its_words(template: str, words: str) -> None:
    with pytest.raises(ConversationError, match="the chat template refuses this") as refused:
        render(tokenizer(template), read_messages([ASKS]), reply=True)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("form", [lambda text: text, lambda text: {"default": text}])
def test_byte_order_mark_of_a_template_is_not_rendered(form: Callable[[str], Any]) -> None:
    marked = without_mark(tokenizer(PLAIN))
    marked.chat_template = form("\ufeff" + PLAIN)
    text = render(without_mark(marked), read_messages([ASKS]), reply=True)
    assert text == "<s>user: Q</s>"


def test_error_of_a_tokenizer_is_told_in_its_words() -> None:
    with pytest.raises(ConversationError, match="the tokenizer refuses this text: TypeError"):
        encode_rendered(tokenizer(PLAIN), "\ud800")
    assert error_words(KeyError()) == "KeyError"


def test_panic_of_a_tokenizer_is_told_and_an_interrupt_is_not() -> None:
    class PanicException(BaseException):
        """What a panic of Rust is in Python."""

    class Failing(ByteTokenizer):
        """Fails for a reason of its own."""

        def __call__(self, text: str, **options: Any) -> Any:
            raise PanicException("index out of bounds") if text == "panic" else KeyboardInterrupt

    with pytest.raises(ConversationError, match="PanicException: index out of bounds"):
        encode_rendered(Failing(), "panic")
    with pytest.raises(KeyboardInterrupt):
        encode_rendered(Failing(), "stop")
