"""Conversations as a model's chat template writes them, and texts as its tokenizer reads them.

Training from the command line, sampling and the chat route of the service share this module, so
that what is trained is what is sampled.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

from everstep.text_files import BYTE_ORDER_MARK

Message = dict[str, Any]
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of a turn's reasoning. Templates leave out that of earlier turns by design."""

_NEUTRAL: tuple[Any, ...] = (None, "", [], {})
_MORE = " more"
_ALWAYS_WRITTEN = ("user", "assistant")
_TEMPLATE_VARIABLES = ("tools", "documents")


class ConversationError(ValueError):
    """A conversation or text that can't be rendered or tokenized as it was meant."""


class FieldNotWritten(ConversationError):
    """The chat template does not write a field.

    Args:
        field: name of the field.
        where: the message that has it, as `` of messages[1]``.
    """

    def __init__(self, field: str, where: str = "") -> None:
        super().__init__(f"the chat template does not write {field!r}{where}")
        self.field = field


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    eos_token_id: int | None
    eos_token: Any
    chat_template: Any
    is_fast: bool

    def __call__(self, text: str, *, add_special_tokens: bool, **options: Any) -> Any:
        """Return ``input_ids`` and, with ``return_offsets_mapping``, ``offset_mapping``."""

    def __hash__(self) -> int:
        """Distinguish tokenizers by identity."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **variables: Any
    ) -> Any:
        """Render a conversation as the model's text."""


class CallArguments(dict[str, Any]):
    """The arguments of a function call: an object, and its JSON text as it came.

    Attributes:
        text: the JSON text.
    """

    def __init__(self, given: str | Mapping[str, Any]) -> None:
        if isinstance(given, str):
            self.text = given
            super().__init__(json.loads(given))
        else:
            self.text = json.dumps(given, ensure_ascii=False)
            super().__init__(given)


def read_messages(values: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return messages as templates expect them.

    The texts of content parts are joined, and content that is null becomes empty. Arguments of
    function calls become objects. Fields without a value are left out.

    Raises:
        ConversationError: a message is malformed, or has content other than text.
    """
    return [_read_message(f"messages[{index}]", value) for index, value in enumerate(values)]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    reply: bool,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation by the chat template.

    Most templates expect the arguments of function calls as objects, which they write as JSON. One
    that writes them as they are, which would be Python's form of an object, gets their JSON text.

    Args:
        tokenizer: with a chat template.
        messages: the conversation, from `read_messages`.
        reply: whether to end with the beginning of the assistant's reply.
        variables: of the template, such as ``tools``.

    Raises:
        ConversationError: the template refuses the conversation. The text has its words.
    """
    apply = partial(_apply, tokenizer, reply=reply, variables=variables or {})
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    if not calls:
        return apply(messages)
    texts = [{**message, **_calls_with_texts(message)} for message in messages]
    try:
        text = apply(messages)
    except ConversationError:
        with contextlib.suppress(ConversationError):
            return apply(texts)
        raise
    contents = "\n".join(message["content"] for message in messages)
    written = (str(call["arguments"]) for call in calls if call["arguments"])
    return apply(texts) if any(each in text and each not in contents for each in written) else text


def check_written(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    reply: bool,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Check that the chat template writes what a conversation says.

    A field counts as written if the text is another without it (for content: with more of it),
    or if the template refuses the conversation then. Of the messages of a role, the first with a
    field stands for all. Ids of function calls need not be written where the results follow the
    calls in order.

    Args:
        tokenizer: with a chat template.
        messages: the conversation, from `read_messages`.
        reply: as of `render`.
        variables: of the template.

    Raises:
        FieldNotWritten: it does not write a field. The text names the first one.
        ConversationError: it refuses the conversation, or a variable is none of its own.
    """
    variables = variables or {}
    _check_variables(tokenizer, variables)
    whole = render(tokenizer, messages, reply=reply, variables=variables)

    def writes(changed: Sequence[Message], given: Mapping[str, Any] = variables) -> bool:
        try:
            return render(tokenizer, changed, reply=reply, variables=given) != whole
        except ConversationError:
            return True

    if "tools" in variables and not writes(messages, _without(variables, "tools")):
        raise FieldNotWritten("tools")
    for index, key in _fields(messages):
        before, message, after = messages[:index], messages[index], messages[index + 1 :]
        if writes([*before, _changed(message, key), *after]):
            continue
        if key not in REASONING or not any(mentions(tokenizer, name) for name in REASONING):
            raise FieldNotWritten(key, f" of messages[{index}] (role {message['role']!r})")


def mentions(tokenizer: Tokenizer, name: str) -> bool:
    """Whether the source of the chat template, or of one of several, mentions a name."""
    template = tokenizer.chat_template
    source = "\n".join(template.values()) if isinstance(template, dict) else str(template)
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def without_mark(tokenizer: Any) -> Any:
    """Remove the byte order marks of the files that a tokenizer's chat templates came from."""
    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = template.removeprefix(BYTE_ORDER_MARK)
    elif isinstance(template, dict):
        tokenizer.chat_template = {
            name: each.removeprefix(BYTE_ORDER_MARK) for name, each in template.items()
        }
    return tokenizer


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize what a chat template wrote. Its special tokens are the template's own.

    Raises:
        ConversationError: the tokenizer refuses it.
    """
    return list(encode(tokenizer, text)["input_ids"])


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize a text to be continued, after the tokens with which the tokenizer begins a text.

    A begin-of-sequence token that the text itself begins with is not doubled. A token with which
    the tokenizer ends a text is left out.

    Raises:
        ConversationError: the tokenizer refuses it.
    """
    return with_beginning(tokenizer, list(encode(tokenizer, text)["input_ids"]))


def with_beginning(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Put the tokens with which the tokenizer begins a text in front, unless they are there."""
    beginning = list(added_tokens(tokenizer)[0])
    return ids if beginning and ids[: len(beginning)] == beginning else beginning + ids


@lru_cache(maxsize=4)
def added_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that the tokenizer adds before and after a text."""
    plain = tuple(encode(tokenizer, "a")["input_ids"])
    whole = tuple(encode(tokenizer, "a", add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return (), ()


def encode(
    tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False, **options: Any
) -> Any:
    """Tokenize a text.

    Raises:
        ConversationError: the tokenizer refuses it.
    """
    try:
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False, **options)
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"  # of Rust, and no `Exception`
        if isinstance(error, MemoryError) or not (panicked or isinstance(error, Exception)):
            raise
        raise ConversationError(f"the tokenizer refuses this text: {error_words(error)}") from error


def error_words(error: BaseException) -> str:
    """Return what another library's error says, on one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text if text and name == "TemplateError" else f"{name}: {text}".removesuffix(": ")


def _apply(
    tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool, variables: Mapping[str, Any]
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=reply, **variables
        )
    except MemoryError:
        raise
    except Exception as error:
        raise ConversationError(
            f"the chat template refuses this conversation: {error_words(error)}"
        ) from error
    return str(text)


def _calls_with_texts(message: Message) -> Message:
    """Return a message's calls with their arguments as JSON texts, nothing if it has none."""
    if "tool_calls" not in message:
        return {}
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [{**function, "arguments": function["arguments"].text} for function in functions]
    pairs = zip(message["tool_calls"], texts, strict=True)
    return {"tool_calls": [{**call, "function": text} for call, text in pairs]}


def _read_message(where: str, value: Mapping[str, Any]) -> Message:
    role = value.get("role")
    if not isinstance(role, str) or not role:
        raise ConversationError(f"{where}.role has to be a text")
    fields = {key: item for key, item in value.items() if item not in _NEUTRAL}
    content = _text(where, value.get("content"))
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(f"{where}.tool_calls", fields["tool_calls"])
    return {**fields, "role": role, "content": content}


def _text(where: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ConversationError(f"{where}.content has to be a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(kind) if isinstance(part, Mapping) and kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise ConversationError(
                f"{where}.content[{index}] has the type {kind!r}; only parts of text can be read"
            )
        others = sorted(key for key in part if key not in ("type", kind, "cache_control"))
        if any(part[key] not in _NEUTRAL for key in others):
            raise ConversationError(f"{where}.content[{index}] has unknown fields: {others}")
        texts.append(text)
    return "".join(texts)


def _tool_calls(where: str, calls: Any) -> list[Any]:
    if not isinstance(calls, list):
        raise ConversationError(f"{where} has to be a list")
    return [_tool_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _tool_call(where: str, call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConversationError(f"{where} has no function with a name")
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str | Mapping):
        raise ConversationError(f"{where}.function.arguments has to be an object or its JSON text")
    try:
        read = CallArguments(arguments)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConversationError(
            f"{where}.function.arguments is not the JSON text of an object: {error}"
        ) from error
    return {**call, "function": {**function, "arguments": read}}


def _check_variables(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
    """Refuse options of the call, and variables that the template does not read."""
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in variables:
        if name in _TEMPLATE_VARIABLES:
            continue
        if name in parameters or name == "messages":
            raise ConversationError(f"chat_template_kwargs: {name!r} is no variable of a template")
        if isinstance(tokenizer.chat_template, str | dict) and not mentions(tokenizer, name):
            raise ConversationError(
                f"chat_template_kwargs: the chat template does not read {name!r}"
            )


def _fields(messages: Sequence[Message]) -> Iterator[tuple[int, str]]:
    """Yield each field to check, as the message's index and the field's key."""
    seen: set[tuple[str, str]] = set()
    calls: dict[str, str] = {}
    waiting: list[str] = []
    for index, message in enumerate(messages):
        keys = [key for key in message if key not in ("role", "content")]
        own = message.get("tool_calls", ())
        if message["content"] and (own or message["role"] not in _ALWAYS_WRITTEN):
            keys.append("content")
        if own:
            waiting = [str(call.get("id")) for call in own]
            calls |= {str(call.get("id")): call["function"]["name"] for call in own}
        link = message.get("tool_call_id")
        if link is not None and waiting[:1] == [link]:
            keys.remove("tool_call_id")
            waiting.pop(0)
        if message["role"] == "tool" and message.get("name") in calls.values():
            keys.remove("name")
        for key in keys:
            if (message["role"], key) not in seen:
                seen.add((message["role"], key))
                yield index, key


def _changed(message: Message, key: str) -> Message:
    """Return a message with other content, or without another field."""
    if key == "content":
        return {**message, "content": message["content"] + _MORE}
    return _without(message, key)


def _without(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}
