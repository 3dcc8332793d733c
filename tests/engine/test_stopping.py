"""Stopping: sequences end at stop tokens, stop strings, end tokens and length limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from everstep.engine import Model, SampleSpec
from everstep.engine.sampling.sequence import SampleRequest
from everstep.wire.codecs.proto import SequenceOutput
from tests.engine.helpers import prompt, sample

EOS = 257


class Pieces:
    """Tokenizer whose tokens decode to given texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, tokens: Iterable[int], **kwargs: Any) -> str:
        return "".join(self.texts[token] for token in tokens)


def draw_tokens(tokens: Iterable[int], spec: SampleSpec, tokenizer: Any) -> SequenceOutput:
    """Run a request whose logits strongly favour these tokens in turn."""
    request = SampleRequest("", spec, None, 1000, (EOS,), tokenizer)
    for token in tokens:
        logits = np.zeros(300, np.float32)
        logits[token] = 90
        if not request.draw(logits[None]):
            break
    (sequence,) = request.output().sequences
    assert len(sequence.tokens) == len(sequence.logprobs) > 0
    return sequence


def drawn_text(text: str, tokenizer: Any, *stop: str) -> str:
    """Draw a text byte by byte until a stop string ends it. Returns the drawn part."""
    sequence = draw_tokens(text.encode(), SampleSpec(prompt(), stop_strings=stop), tokenizer)
    if len(sequence.tokens) < len(text.encode()):
        assert sequence.stop_reason == "stop"
    return bytes(sequence.tokens.tolist()).decode()


# Stop strings


@pytest.mark.parametrize(
    ("text", "stop", "until"),
    [
        ("one\n\ntwo", ["\n\n"], "one\n\n"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("aaab", ["aab"], "aaab"),
        ("a STOP b END c", ["END", "STOP"], "a STOP"),
        ("STOP", ["STOP"], "STOP"),
        ("Stop", ["STOP"], "Stop"),
        ("prix: 5 € et 6", ["€"], "prix: 5 €"),
        ("日本語のテキスト", ["の"], "日本語の"),
        ("emoji 👩‍🚀!", ["👩‍🚀"], "emoji 👩‍🚀"),
        ("a . b , c", [" ,"], "a . b ,"),
        ("x" * 300 + "User:" + "y", ["User:"], "x" * 300 + "User:"),
        ("text", ["x", "te"], "te"),
    ],
)
def test_a_stop_string_ends_a_sequence_and_belongs_to_it(
    tokenizer: Any, text: str, stop: list[str], until: str
) -> None:
    assert drawn_text(text, tokenizer, *stop) == until


def test_a_stop_string_may_begin_and_end_inside_tokens() -> None:
    tokens = Pieces("Hello", " wor", "ld!\n", "\nUser", ": hi", " more")
    spec = SampleSpec(prompt(), stop_strings=("\n\nUser:",))
    assert draw_tokens([0, 1, 2, 3, 4, 5], spec, tokens).tokens.tolist() == [0, 1, 2, 3, 4]


def test_the_end_token_may_be_a_stop_string(tokenizer: Any) -> None:
    spec = SampleSpec(prompt(), stop_strings=("<|end|>",), use_eos=False)
    assert draw_tokens([65, EOS, 66], spec, tokenizer).tokens.tolist() == [65, EOS]


def test_a_stop_string_in_the_prompt_is_ignored(llama: Model) -> None:
    text = prompt(*b"STOP")
    spec = SampleSpec(text, max_tokens=5, stop_strings=("STOP",), use_eos=False)
    assert len(sample(llama, spec).sequences[0].tokens) == 5


# Stop tokens and the model's end


def test_a_stop_token_ends_a_sequence_and_belongs_to_it(model: Model) -> None:
    spec = SampleSpec(prompt(), 4, max_tokens=60, seed=3, temperature=1.5, use_eos=False)
    free = sample(model, spec).sequences
    token = int(free[0].tokens[4])
    stopped = sample(model, replace(spec, stop_tokens=(token, 258))).sequences
    assert len(stopped) == len(free) == 4
    for cut, whole in zip(stopped, free, strict=True):
        assert len(whole.tokens) == 60
        hits = np.flatnonzero(np.isin(whole.tokens, (token, 258)))
        length = int(hits[0]) + 1 if len(hits) else 60
        assert cut.tokens.tolist() == whole.tokens[:length].tolist()
        assert cut.stop_reason == ("stop" if len(hits) else "length")
        np.testing.assert_allclose(cut.logprobs, whole.logprobs[:length], atol=1e-5)
    assert stopped[0].stop_reason == "stop"
    assert len(stopped[0].tokens) <= 5


def test_the_end_token_ends_a_sequence_unless_use_eos_is_false(llama: Model) -> None:
    spec = SampleSpec(prompt(), 16, max_tokens=60, seed=3, temperature=2.0, use_eos=False)
    free = sample(llama, spec).sequences
    assert {s.stop_reason for s in free} == {"length"}
    ended = [index for index, s in enumerate(free) if EOS in s.tokens]
    assert ended, "no sequence drew the end token"
    with_end = sample(llama, replace(spec, use_eos=True)).sequences
    for index in ended:
        assert with_end[index].stop_reason == "stop"
        assert with_end[index].tokens[-1] == EOS
        assert with_end[index].tokens.tolist().count(EOS) == 1


def test_stop_tokens_replace_the_end_token(tokenizer: Any) -> None:
    spec = SampleSpec(prompt(), stop_tokens=(65,), use_eos=False)
    assert draw_tokens([66, EOS, 66, 65, 66], spec, tokenizer).tokens.tolist() == [66, EOS, 66, 65]


# Lengths


@pytest.mark.parametrize("most", [1, 2, 17])
def test_exactly_max_tokens_are_drawn(llama: Model, most: int) -> None:
    spec = SampleSpec(prompt(), 3, max_tokens=most, use_eos=False)
    sequences = sample(llama, spec).sequences
    assert [len(s.tokens) for s in sequences] == [most] * 3
    assert [len(s.logprobs) for s in sequences] == [most] * 3
    assert {s.stop_reason for s in sequences} == {"length"}


def test_zero_max_tokens_draws_no_token(llama: Model) -> None:
    output = sample(llama, SampleSpec(prompt(), 2, max_tokens=0, prompt_logprobs=True))
    assert [s.tokens.tolist() for s in output.sequences] == [[], []]
    assert {s.stop_reason for s in output.sequences} == {"length"}
    assert output.prompt_logprobs is not None


def test_without_max_tokens_the_context_is_filled(llama: Model) -> None:
    text = prompt(*[1] * 240)
    (sequence,) = sample(llama, SampleSpec(text, use_eos=False)).sequences
    assert len(text) + len(sequence.tokens) == llama.info.max_context_length
    assert sequence.stop_reason == "length"


def test_a_stop_token_at_the_length_limit_reports_stop(llama: Model) -> None:
    spec = SampleSpec(prompt(), max_tokens=5, seed=1, use_eos=False)
    (free,) = sample(llama, spec).sequences
    last = int(free.tokens[-1])
    assert last not in free.tokens[:-1].tolist()
    (stopped,) = sample(llama, replace(spec, stop_tokens=(last,))).sequences
    assert stopped.stop_reason == "stop"
    assert stopped.tokens.tolist() == free.tokens.tolist()
