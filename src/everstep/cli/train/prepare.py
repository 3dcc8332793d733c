"""Examples as datums: rendered by the chat template, tokenized once, cut to the maximum length.

A datum is the tokens of a text shifted by one: the input at position i is token i and the target
is token i + 1, with weight 1 if that token is learnt and 0 otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from everstep import Datum, ModelInput
from everstep.cli.common.output import counted
from everstep.cli.train.data import Source
from everstep.cli.train.examples import Completion, Conversation, DataError, Example, Text
from everstep.cli.train.tokens import Span, Tokenized, tokenize
from everstep.conversations import (
    REASONING,
    ConversationError,
    FieldNotWritten,
    Message,
    Tokenizer,
    added_tokens,
    check_written,
    encode_prompt,
    encode_rendered,
    render,
    with_beginning,
)

_MAX_NAMED = 3
_PLAIN_FIELDS = {"role", "content"}


@dataclass(frozen=True)
class Prepared:
    """The datums of examples, and the outcome of each example.

    Attributes:
        datums: at least one.
        total: number of examples.
        cut: file and line of the examples of which learnt tokens were cut off.
        dropped: file and line of the examples of which nothing learnt was left.
        max_length: the maximum number of tokens of a datum's input.
        longest: number of tokens that the longest example needs.
        seams: number of replies that begin within a token of their prompt.
    """

    datums: list[Datum]
    total: int
    cut: list[str]
    dropped: list[str]
    max_length: int
    longest: int
    seams: int = 0

    @property
    def kept(self) -> int:
        """The number of examples that are trained on, in whole or in part."""
        return self.total - len(self.dropped)

    def counts(self) -> dict[str, int]:
        """Return the number of examples that are kept, of these cut, and dropped."""
        return {"kept": self.kept, "cut": len(self.cut), "dropped": len(self.dropped)}

    def report(self) -> str:
        """Describe the examples that are trained on, and those that are not."""
        kept = "all" if self.kept == self.total else str(self.kept)
        made = counted(len(self.datums), "sequence")
        parts = [f"{kept} of {self.total} examples kept, as {made}"]
        if self.cut:
            parts.append(
                f"{len(self.cut)} cut at {self.max_length} tokens, without the end "
                f"({_named(self.cut)})"
            )
        if self.dropped:
            parts.append(
                f"{len(self.dropped)} dropped: nothing learnt in their first "
                f"{self.max_length} tokens ({_named(self.dropped)})"
            )
        if self.cut or self.dropped:
            parts.append(f"the longest needs --max-length {self.longest}")
        if self.seams:
            parts.append(
                f"the prompts of {self.seams} learnt texts end within a token, such as a space "
                "that belongs to the next word: it is learnt whole"
            )
        return "; ".join(parts)

    def check_dropped(self, max_dropped: float) -> None:
        """Raise `DataError` if a larger share of the examples was dropped."""
        if len(self.dropped) > max_dropped * self.total:
            share = math.ceil(100 * len(self.dropped) / self.total) / 100
            raise DataError(
                f"{len(self.dropped)} of {self.total} examples would be dropped: nothing learnt is "
                f"in their first {self.max_length} tokens ({_named(self.dropped)}). The longest "
                f"needs --max-length {self.longest}; shorten the prompts, or allow it with "
                f"--max-dropped {share:g}."
            )


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from, as text and as tokens."""

    text: str
    tokens: list[int]


def prepare(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Prepared:
    """Turn examples into datums.

    Args:
        examples: at least one.
        tokenizer: the base model's tokenizer.
        max_length: maximum number of tokens of a datum's input. The rest is cut off.

    Raises:
        DataError: an example can't be trained on as it is meant, or no datum is left.
    """
    datums: list[Datum] = []
    cut, dropped, longest, seams = [], [], 0, 0
    for example in examples:
        try:
            sequences = list(_sequences(example, tokenizer))
        except FieldNotWritten as error:
            raise DataError(
                f"{example.where}: {error}. If it does not matter, give --ignore {error.field}"
            ) from error
        except ConversationError as error:
            raise DataError(f"{example.where}: {error}") from error
        wanted = sum(sum(each.learnt[1:]) for each in sequences)
        longest = max([longest, *(len(each.ids) - 1 for each in sequences)])
        seams += sum(each.seams for each in sequences)
        made = [
            datum
            for each in sequences
            for datum in _windows(each, max_length, every=isinstance(example, Text))
        ]
        found = sum(sum(datum.loss_fn_inputs["weights"].tolist()) for datum in made)
        if not made:
            dropped.append(example.where)
        elif found < wanted:
            cut.append(example.where)
        datums += made
    prepared = Prepared(datums, len(examples), cut, dropped, max_length, longest, seams)
    if not datums:
        raise DataError(
            f"no example has anything to learn in its first {max_length} tokens; the longest needs "
            f"--max-length {longest}. Shorten the prompts or give more text"
        )
    return prepared


def notes(source: Source, tokenizer: Tokenizer) -> Iterator[str]:
    """Describe the ignored fields of a file, and the inputs that its tokens are made without."""
    if source.ignored:
        named = (f"{key} ({count})" for key, count in sorted(source.ignored.items()))
        yield f"ignored fields: {', '.join(named)}"
    chats = any(isinstance(each, Conversation) for each in source.examples)
    if chats and not tokenizer.chat_template:
        yield "the model has no chat template: turns are lines of 'role: content'"
    if not getattr(tokenizer, "is_fast", False):
        yield "the tokenizer gives no offsets of its tokens: prompts and wholes are compared"


def first_prompt(examples: Sequence[Example], tokenizer: Tokenizer) -> Prompt:
    """Return a prompt to sample from: the first example's context, or the first words of a text."""
    first = examples[0]
    if isinstance(first, Conversation) and tokenizer.chat_template:
        turns = first.messages[: first.learnt[0]]
        text = render(tokenizer, turns, reply=True, variables=first.variables)
        return Prompt(text, encode_rendered(tokenizer, text))
    if isinstance(first, Conversation):
        text, spans = _plain(first.messages, first.learnt, tokenizer)
        text = text[: spans[0][0]]
    elif isinstance(first, Completion):
        text = first.prompt
    else:
        text = " ".join(first.text.split()[:4])
    return Prompt(text, encode_prompt(tokenizer, text))


def _sequences(example: Example, tokenizer: Tokenizer) -> Iterator[Tokenized]:
    """Yield the token sequences of an example, each with the mask of its learnt tokens."""
    if isinstance(example, Conversation) and tokenizer.chat_template:
        for text, spans in _rendered(example, tokenizer):
            yield tokenize(tokenizer, text, spans)
        return
    if isinstance(example, Conversation):
        made = tokenize(tokenizer, *_plain(example.messages, example.learnt, tokenizer))
        end = []
    else:
        prompt = example.prompt if isinstance(example, Completion) else ""
        text = prompt + (example.completion if isinstance(example, Completion) else example.text)
        made = tokenize(tokenizer, text, [(len(prompt), len(text))])
        end = _end(tokenizer, made.ids)
    whole = with_beginning(tokenizer, made.ids)
    before = [0] * (len(whole) - len(made.ids))
    yield Tokenized(whole + end, before + made.learnt + [1] * len(end), made.seams)


def _end(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return the tokens that end a text, unless it ends with them already."""
    end = list(added_tokens(tokenizer)[1])
    if not end and tokenizer.eos_token_id is not None:
        end = [tokenizer.eos_token_id]
    return [] if list(ids[-len(end) :]) == end else end


def _windows(made: Tokenized, max_length: int, *, every: bool) -> Iterator[Datum]:
    """Yield the windows that have learnt tokens, or the first one alone."""
    for start in range(0, len(made.ids) - 1, max_length) if every else (0,):
        tokens = made.ids[start : start + max_length + 1]
        weights = [float(each) for each in made.learnt[start + 1 : start + max_length + 1]]
        if any(weights):
            inputs = {"target_tokens": tokens[1:], "weights": weights}
            yield Datum.model_validate(
                {"model_input": ModelInput.from_ints(tokens[:-1]), "loss_fn_inputs": inputs}
            )


def _rendered(example: Conversation, tokenizer: Tokenizer) -> list[tuple[str, list[Span]]]:
    """Render a conversation as it is sampled: each learnt turn after the prompt of all before it.

    Turns are in one text as long as the rendering of the later one begins with that of the earlier
    one. A template that rewrites earlier turns, as those that leave out earlier reasoning do,
    gives a text for each turn.
    """
    made: list[tuple[str, list[Span]]] = []
    messages, variables = example.messages, example.variables
    check_written(tokenizer, messages, reply=False, variables=variables)
    for index in example.learnt:
        before = render(tokenizer, messages[:index], reply=True, variables=variables)
        after = render(tokenizer, messages[: index + 1], reply=False, variables=variables)
        if not after.startswith(before) or len(after) == len(before):
            raise ConversationError(
                f"the chat template does not write the reply messages[{index}] after the prompt "
                f"with which it is sampled, which ends with {before[-30:]!r}; a variable of the "
                "template in chat_template_kwargs may change that, or write the row as prompt and "
                "completion"
            )
        _check_reply(tokenizer, example, index, after)
        span = len(before), len(after)
        if made and before.startswith(made[-1][0]):
            made[-1] = after, [*made[-1][1], span]
        else:
            made.append((after, [span]))
    return made


def _check_reply(tokenizer: Tokenizer, example: Conversation, index: int, after: str) -> None:
    """Check that a learnt turn's reasoning is among its learnt tokens."""
    turn = example.messages[index]
    for key in REASONING:
        if key in turn:
            without = [*example.messages[:index], {k: v for k, v in turn.items() if k != key}]
            if render(tokenizer, without, reply=False, variables=example.variables) == after:
                raise FieldNotWritten(key, f" of messages[{index}]")


def _plain(
    messages: Sequence[Message], learnt: Sequence[int], tokenizer: Tokenizer
) -> tuple[str, list[Span]]:
    """Write ``role: content`` lines, for a tokenizer without a chat template."""
    end = tokenizer.eos_token or ""
    text, spans = "", []
    for index, message in enumerate(messages):
        if others := sorted(message.keys() - _PLAIN_FIELDS):
            raise ConversationError(
                f"the model has no chat template, which {others[0]!r} of messages[{index}] needs"
            )
        text += f"{message['role']}: "
        begin = len(text)
        text += message["content"] + (end if message["role"] == "assistant" else "")
        if index in learnt:
            spans.append((begin, len(text)))
        text += "\n"
    return text, spans


def _named(places: Sequence[str]) -> str:
    """Name the first places."""
    more = len(places) - _MAX_NAMED
    return ", ".join(places[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
