"""Text to train on: read from a file or the standard library, turned into datums.

An example is a list of `Segment`: text that is context, and text that is learnt. A datum is the
tokens of all segments shifted by one: position i is given token i, is asked for token i + 1, and
counts with the weight of token i + 1, which is 1 where that token is learnt and 0 elsewhere.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from everstep import Datum, ModelInput

STANDARD_LIBRARY = "docstrings of Python's standard library"
_MODULES = (
    "argparse",
    "bisect",
    "calendar",
    "cmd",
    "codecs",
    "configparser",
    "contextlib",
    "csv",
    "dataclasses",
    "datetime",
    "difflib",
    "fractions",
    "functools",
    "gettext",
    "heapq",
    "inspect",
    "ipaddress",
    "mailbox",
    "os",
    "pathlib",
    "pprint",
    "random",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "turtle",
    "typing",
    "uuid",
    "zipfile",
)
_SHORTEST_DOCSTRING = 40


class DataError(ValueError):
    """Data that can't be trained on; the text names the file, the line and what to do."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """The text's token ids."""

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """A conversation as the model's text."""


@dataclass(frozen=True)
class Segment:
    """A stretch of text.

    Attributes:
        text: the text.
        learnt: whether its tokens count in the loss.
        ends: whether the model is to stop after it.
    """

    text: str
    learnt: bool
    ends: bool = False


@dataclass(frozen=True)
class Example:
    """One example: its segments, or a conversation that the tokenizer's template turns into them.

    Attributes:
        segments: context and what is learnt, in order.
        messages: a conversation, instead of segments.
        windows: a long text, to be cut into stretches of the longest length.
    """

    segments: tuple[Segment, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    windows: bool = False


def read_examples(path: Path | None) -> list[Example]:
    """Read what to train on.

    Args:
        path: a ``.txt`` of plain text, or a ``.jsonl`` whose lines are ``{"prompt": …,
            "completion": …}`` or ``{"messages": [{"role": …, "content": …}, …]}``; None: the
            docstrings of the standard library, each with its signature as the prompt.

    Raises:
        DataError: the file can't be read or holds something else.
    """
    if path is None:
        return list(_standard_library())
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: give a .txt or a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: is empty; there is nothing to train on")
    if path.suffix == ".txt":
        return [Example(segments=(Segment(text, learnt=True, ends=True),), windows=True)]
    lines = ((f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1))
    return [_json_example(where, line) for where, line in lines if line.strip()]


def datums(examples: Iterable[Example], tokenizer: Tokenizer, longest: int) -> list[Datum]:
    """Turn examples into datums; those whose learnt part lies beyond ``longest`` are left out.

    Args:
        examples: from `read_examples`.
        tokenizer: the base model's.
        longest: tokens of a datum's input at most; the rest is cut off.

    Raises:
        DataError: nothing is left to train on.
    """
    made = [each for example in examples for each in _datums(example, tokenizer, longest)]
    if not made:
        raise DataError(
            f"no example has anything to learn in its first {longest} tokens; "
            "shorten the prompts or give more text"
        )
    return made


def first_prompt(examples: Sequence[Example], tokenizer: Tokenizer) -> str:
    """A prompt to sample from: the context of the first example, or the text's first words."""
    segments = _segments(examples[0], tokenizer)
    context = segments[0]
    return context.text if not context.learnt else " ".join(context.text.split()[:4])


def _datums(example: Example, tokenizer: Tokenizer, longest: int) -> Iterator[Datum]:
    tokens, weights = _tokens(_segments(example, tokenizer), tokenizer)
    stretch = longest + 1
    starts = range(0, len(tokens) - 1, longest) if example.windows else (0,)
    for start in starts:
        if any(weights[start + 1 : start + stretch]):
            yield _datum(tokens[start : start + stretch], weights[start : start + stretch])


def _datum(tokens: list[int], weights: list[float]) -> Datum:
    return Datum.model_validate(
        {
            "model_input": ModelInput.from_ints(tokens[:-1]),
            "loss_fn_inputs": {"target_tokens": tokens[1:], "weights": weights[1:]},
        }
    )


def _tokens(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Tokens and, for each of them, whether it is learnt; the model's begin token comes first."""
    tokens: list[int] = []
    weights: list[float] = []
    for segment in segments:
        ids = list(tokenizer.encode(segment.text, add_special_tokens=False, verbose=False))
        if segment.ends and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        tokens += ids
        weights += [float(segment.learnt)] * len(ids)
    begin = tokenizer.bos_token_id
    if begin is not None and tokens[:1] != [begin]:
        return [begin, *tokens], [0.0, *weights]
    return tokens, weights


def _segments(example: Example, tokenizer: Tokenizer) -> tuple[Segment, ...]:
    if not example.messages:
        return example.segments
    if tokenizer.chat_template:
        segments = _templated(example.messages, tokenizer)
        if segments:
            return segments
    return _plain(example.messages)


def _templated(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> tuple[Segment, ...]:
    """Segments by the tokenizer's chat template, the assistant's turns learnt.

    A turn begins where the template, asked for all before it and for a reply, ends. Where what it
    then says is not how the whole conversation goes on, as with templates that rewrite earlier
    turns, that turn is context; none left: no segments.
    """

    def render(turns: Sequence[dict[str, str]], reply: bool) -> str:
        return str(
            tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=reply)
        )

    whole = render(messages, reply=False)
    segments, at = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], reply=True)
        after = render(messages[: index + 1], reply=False)
        if whole.startswith(before) and whole.startswith(after) and at <= len(before) < len(after):
            segments += [Segment(whole[at : len(before)], learnt=False)]
            segments += [Segment(whole[len(before) : len(after)], learnt=True)]
            at = len(after)
    if not segments:
        return ()
    return tuple(each for each in (*segments, Segment(whole[at:], learnt=False)) if each.text)


def _plain(messages: Sequence[dict[str, str]]) -> tuple[Segment, ...]:
    """Segments for a tokenizer without a template: ``role: content`` lines."""
    segments = []
    for message in messages:
        learnt = message["role"] == "assistant"
        segments.append(Segment(f"{message['role']}: ", learnt=False))
        segments.append(Segment(message["content"], learnt=learnt, ends=learnt))
        segments.append(Segment("\n", learnt=False))
    return tuple(segments)


def _json_example(where: str, line: str) -> Example:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON: {error}") from error
    if isinstance(value, dict) and "messages" in value:
        return Example(messages=tuple(_message(where, each) for each in _messages(where, value)))
    if isinstance(value, dict) and "prompt" in value and "completion" in value:
        prompt, completion = value["prompt"], value["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise DataError(f"{where}: prompt and completion must be strings")
        if not completion:
            raise DataError(f"{where}: completion is empty; there is nothing to learn")
        return _supervised(prompt, completion)
    found = f"the keys {', '.join(map(repr, value))}" if isinstance(value, dict) else "no object"
    raise DataError(
        f'{where}: a line is {{"prompt": …, "completion": …}} or {{"messages": […]}}; '
        f"this one has {found}"
    )


def _messages(where: str, value: dict[str, Any]) -> list[Any]:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one message")
    if not any(isinstance(each, dict) and each.get("role") == "assistant" for each in messages):
        raise DataError(f"{where}: no message has the role 'assistant'; there is nothing to learn")
    return messages


def _message(where: str, value: Any) -> dict[str, str]:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (0, 0)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f'{where}: a message is {{"role": …, "content": …}}, both strings')
    return {"role": role, "content": content}


def _standard_library() -> Iterator[Example]:
    """Signatures of the standard library's functions, each with its docstring to learn."""
    root = Path(sysconfig.get_path("stdlib"))
    places = ((root / f"{module}.py", root / module / "__init__.py") for module in _MODULES)
    for path in (place for both in places for place in both if place.exists()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                prompt = f"def {node.name}({ast.unparse(node.args)}):\n"
                yield _supervised(prompt, f'    """{text}"""\n')


def _supervised(prompt: str, completion: str) -> Example:
    return Example((Segment(prompt, learnt=False), Segment(completion, learnt=True, ends=True)))
