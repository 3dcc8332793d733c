"""Rows of training files: what each field means, and which fields can't be honoured.

A row has one of these forms. Every other field is an error, unless it has no value, its name is
that of a mere label (`LABELS`), or the user wants it ignored.

    {"prompt": "…", "completion": "…"}
    {"messages": [{"role": …, "content": …}, …], "tools": […], "chat_template_kwargs": {…}}
    {"prompt": [messages], "completion": [messages]}, with the same fields beside them
    {"conversations": [{"from": …, "value": …}, …], "system": "…", "tools": […]}
    {"text": "…"}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from everstep.cli.train.examples import Completion, Conversation, DataError, Example, Text
from everstep.conversations import ConversationError, read_messages

LABELS = frozenset(
    (
        "id",
        "_id",
        "idx",
        "index",
        "uuid",
        "prompt_id",
        "conversation_id",
        "source",
        "dataset",
        "split",
        "url",
        "title",
        "category",
        "subject",
        "topic",
        "language",
        "lang",
        "tags",
        "created",
        "created_at",
        "timestamp",
        "license",
        "metadata",
        "meta",
    )
)
"""Names of fields that label a row or a message and say nothing about how to train."""

_FORMS = '{"prompt": …, "completion": …}, {"messages": […]}, {"conversations": […]} or {"text": …}'
_NEUTRAL: tuple[Any, ...] = (None, "", [], {})
_CHAT_FIELDS = ("tools", "chat_template_kwargs", "parallel_tool_calls")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_PREFERENCE = (
    "is of a preference pair, which supervised training can't learn from; keep the preferred reply "
    "as a row of messages, or as prompt and completion"
)
_TOKENIZED = "holds tokens; give the text, which the model's own tokenizer reads"
_MEDIA = "holds other content than text, which can't be trained on"
_ALPACA = 'is of the form of Alpaca; write it as {"messages": […]}, or as prompt and completion'
_HINTS = {
    **dict.fromkeys(
        ("chosen", "rejected", "preferred_output", "non_preferred_output"), _PREFERENCE
    ),
    **dict.fromkeys(("input_ids", "attention_mask", "labels", "token_ids"), _TOKENIZED),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("instruction", "output"), _ALPACA),
    "label": "says whether a completion is good, which supervised training can't learn from; "
    "keep the rows of good ones without it",
    "functions": "is the older form of tools; write it as tools",
    "parallel_tool_calls": "can't be given to the model; put it into the system message",
}


class RowReader:
    """Reads rows, and counts the fields that are ignored.

    Args:
        ignore: names of fields of rows and messages to ignore besides `LABELS`.

    Attributes:
        ignored: how often each field with a value was ignored.
    """

    def __init__(self, ignore: Collection[str] = ()) -> None:
        self._ignore = frozenset(ignore)
        self.ignored: Counter[str] = Counter()

    def read(self, where: str, line: str) -> Example:
        """Read a row.

        Args:
            where: file and line, for error texts.
            line: JSON.

        Raises:
            DataError: the row is malformed, or has a field that can't be honoured.
        """
        row = self._without_ignored(_object(where, line))
        try:
            return _example(where, row, self._without_ignored)
        except ConversationError as error:
            raise DataError(f"{where}: {error}") from error

    def _without_ignored(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        kept = {}
        for key, value in fields.items():
            if key in self._ignore or key in LABELS:
                self.ignored[key] += value not in _NEUTRAL
            elif value is not None:
                kept[key] = value
        return kept


Clean = Callable[[Mapping[str, Any]], dict[str, Any]]


def _example(where: str, row: dict[str, Any], clean: Clean) -> Example:
    for key, value in row.items():
        if key == "parallel_tool_calls" and value is True:
            continue  # what a template that knows several calls allows anyway
        if key in _HINTS and value not in _NEUTRAL:
            raise _cant_honour(where, key, _HINTS[key])
    forms = [key for key in ("messages", "conversations", "text", "completion") if key in row]
    if len(forms) != 1 or ("completion" in row) != ("prompt" in row):
        raise DataError(
            f"{where}: a line is {_FORMS}; this one has "
            f"{'the keys ' + ', '.join(map(repr, row)) if row else 'no keys'}"
        )
    if forms == ["text"]:
        return _text(where, row)
    if forms == ["conversations"]:
        return _sharegpt(where, row, clean)
    if forms == ["messages"]:
        _no_other_fields(where, row, ("messages", *_CHAT_FIELDS))
        turns = _list(where, "messages", row["messages"])
        return _conversation(where, row, turns, clean)
    return _completion(where, row, clean)


def _text(where: str, row: dict[str, Any]) -> Text:
    _no_other_fields(where, row, ("text",))
    if not isinstance(row["text"], str) or not row["text"]:
        raise DataError(f"{where}: text must be a string that is not empty")
    return Text(where, row["text"])


def _completion(where: str, row: dict[str, Any], clean: Clean) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        _no_other_fields(where, row, ("prompt", "completion", *_CHAT_FIELDS))
        turns = [*prompt, *_list(where, "completion", completion)]
        return _conversation(where, row, turns, clean, first=len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(f"{where}: prompt and completion must be strings, or lists of messages")
    _no_other_fields(where, row, ("prompt", "completion"))
    if not completion:
        raise DataError(f"{where}: completion is empty; there is nothing to learn")
    return Completion(where, prompt, completion)


def _sharegpt(where: str, row: dict[str, Any], clean: Clean) -> Conversation:
    _no_other_fields(where, row, ("conversations", "system", *_CHAT_FIELDS))
    turns = [
        _sharegpt_turn(f"{where}: conversations[{index}]", turn)
        for index, turn in enumerate(_list(where, "conversations", row["conversations"]))
    ]
    if (system := row.get("system")) not in _NEUTRAL:
        if turns[0].get("role") == "system":
            raise DataError(f"{where}: there are two system messages, in system and in the turns")
        turns = [{"role": "system", "content": system}, *turns]
    return _conversation(where, row, turns, clean)


def _sharegpt_turn(where: str, turn: Any) -> dict[str, Any]:
    """Return a turn of ShareGPT's form as a message."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        if isinstance(turn, dict) and "role" in turn:
            return turn
        raise DataError(f'{where}: a turn is {{"from": …, "value": …}}')
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker, value = turn["from"], turn["value"]
    if speaker != "function_call":
        return {"role": _ROLES.get(speaker, speaker), "content": value, **others}
    try:
        call = json.loads(value)
        calls = call if isinstance(call, list) else [call]
        made = [{"type": "function", "function": dict(each)} for each in calls]
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: the function call is not JSON of name and arguments") from error
    return {"role": "assistant", "content": "", "tool_calls": made, **others}


def _conversation(
    where: str, row: dict[str, Any], turns: Sequence[Any], clean: Clean, first: int = 0
) -> Conversation:
    """Read a conversation. Turns of the assistant from ``first`` on are learnt."""
    learnt, messages = [], []
    for index, turn in enumerate(turns):
        at = f"{where}: messages[{index}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError(f'{at}: a message is {{"role": …, "content": …}}')
        message = clean(turn)
        trained = _is_trained(at, message)
        if message["role"] == "assistant":
            if not any(value not in _NEUTRAL for key, value in message.items() if key != "role"):
                raise DataError(f"{at}: the assistant says nothing; its content is empty")
            if index >= first and trained is not False:
                learnt.append(index)
        elif trained:
            raise DataError(f"{at}: only turns of the assistant are learnt, not of {turn['role']}")
        elif "content" not in message:
            raise DataError(f"{at}: has no content")
        messages.append(message)
    if not learnt:
        raise DataError(
            f"{where}: no message has the role 'assistant' and is to be learnt; there is nothing "
            "to learn"
        )
    variables = _variables(where, row)
    return Conversation(where, tuple(read_messages(messages)), tuple(learnt), variables)


def _is_trained(where: str, message: dict[str, Any]) -> bool | None:
    """Take out whether a turn is learnt, None if it isn't said.

    OpenAI's field for it is ``weight``, Axolotl's is ``train``.
    """
    said = []
    for key in ("weight", "train"):
        if key in message:
            value = message.pop(key)
            if value not in (0, 1):
                raise DataError(f"{where}: {key} is 0 or 1 (false or true), not {value!r}")
            said.append(bool(value))
    if len(set(said)) > 1:
        raise DataError(f"{where}: weight and train say different things")
    return said[0] if said else None


def _variables(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of the chat template."""
    variables = row.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise DataError(f"{where}: chat_template_kwargs must be an object")
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: tools is not JSON: {error}") from error
    if tools in _NEUTRAL or (isinstance(tools, str) and not tools.strip()):
        return dict(variables)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools must be a list of objects")
    if "tools" in variables:
        raise DataError(f"{where}: tools are given twice, in the row and in chat_template_kwargs")
    return {**variables, "tools": tools}


def _list(where: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key} must be a list of at least one message")
    return value


def _no_other_fields(where: str, row: Mapping[str, Any], known: Collection[str]) -> None:
    for key, value in row.items():
        if key not in known and value not in _NEUTRAL:
            raise _cant_honour(where, key, "is not known, and may change what should be learnt")


def _cant_honour(where: str, key: str, reason: str) -> DataError:
    return DataError(f"{where}: {key!r} {reason}. If it does not matter, give --ignore {key}")


def _object(where: str, line: str) -> dict[str, Any]:
    """Parse a line as an object without repeated keys."""
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a line is {_FORMS}; this one is no object")
    if "\\ud" in line.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: has half of a character: {error.reason}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object. Raises ValueError if a key is repeated, of which one would be lost."""
    built = dict(pairs)
    if len(built) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} is there twice")
    return built
