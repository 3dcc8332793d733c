"""What is trained is what is sampled, for tokenizers of every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tokenizers.processors import ByteLevel

from everstep.cli.train.data import read_examples
from everstep.cli.train.examples import DataError
from everstep.cli.train.prepare import prepare
from everstep.cli.train.tokens import tokenize
from everstep.worker.chat_template import prompt_tokens
from tests.cli.byte_tokenizer import BEGIN, END, ByteTokenizer
from tests.tiny_tokenizers import CHAT, FAMILIES, tokenizer_of

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "word  to é日 \U0001f600?"},
    {"role": "assistant", "content": "yes, to é日\n no "},
    {"role": "user", "content": " ab"},
    {"role": "assistant", "content": "日"},
]


def trained(tmp_path: Path, tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens of a row's only sequence, and which of them are learnt."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    [datum] = prepare(read_examples(path).examples, tokenizer, 10_000).datums
    inputs = datum.loss_fn_inputs
    given, targets = datum.model_input.to_ints(), inputs["target_tokens"].tolist()
    assert given[1:] == targets[:-1]
    return [given[0], *targets], [0, *map(int, inputs["weights"].tolist())]


def sampled(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """Return the prompt that the service samples from."""
    return prompt_tokens("m", tokenizer, {"messages": turns, "template": {}})


@pytest.fixture(params=[*FAMILIES])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(FAMILIES[request.param])


@pytest.mark.parametrize("template", [CHAT, CHATML])
def test_trained_conversation_is_the_prompt_history_of_sampling(
    tmp_path: Path, tokenizer: Any, template: str
) -> None:
    tokenizer.chat_template = template

    ids, learnt = trained(tmp_path, tokenizer, {"messages": TURNS})

    history = sampled(tokenizer, [*TURNS, {"role": "user", "content": ""}])
    assert history[: len(ids)] == ids
    if template == CHATML:  # a prompt that ends between tokens is a prefix, too
        for turn in (1, 3):
            prompt = sampled(tokenizer, TURNS[:turn])
            assert ids[: len(prompt)] == prompt
            assert (learnt[len(prompt) - 1], learnt[len(prompt)]) == (0, 1)


def test_every_reply_is_learnt_with_its_end_and_nothing_else(
    tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = CHAT

    ids, learnt = trained(tmp_path, tokenizer, {"messages": TURNS})

    runs: list[list[int]] = []
    before = 0
    for token, now in zip(ids, learnt, strict=True):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
        before = now
    end = tokenizer.eos_token_id
    assert [run[-1] for run in runs] == [end, end]
    learnt = [tokenizer.decode(run[:-1]).split() for run in runs]
    plain = [
        tokenizer.decode(tokenizer(t["content"], add_special_tokens=False)["input_ids"])
        for t in TURNS
    ]
    assert learnt == [plain[1].split(), plain[3].split()]


def test_prompt_and_completion_are_tokenized_as_one_text(tmp_path: Path, tokenizer: Any) -> None:
    ids, learnt = trained(tmp_path, tokenizer, {"prompt": "ab word", "completion": " yes"})

    prompt = prompt_tokens("m", tokenizer, {"text": "ab word"})
    assert ids == [*prompt_tokens("m", tokenizer, {"text": "ab word yes"}), tokenizer.eos_token_id]
    assert ids[: len(prompt)] == prompt
    assert learnt == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert sum(learnt) == 2, "the word and the end"


def test_token_across_the_seam_is_learnt() -> None:
    tokenizer = tokenizer_of(FAMILIES["unigram"])
    made = tokenize(tokenizer, "word yes to", [(5, 8)])
    ids, learnt = made.ids, made.learnt
    assert made.seams == 1
    assert tokenize(tokenizer, "word yes to", [(4, 8)]) == replace(made, seams=0)
    assert tokenize(tokenizer, "word yes to", [(5, 7)]) == made, "a part is learnt whole"
    with mock.patch.object(type(tokenizer), "is_fast", new=False):
        assert tokenize(tokenizer, "word yes to", [(5, 7)]) == made
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁word", "▁yes", "▁to"]
    assert learnt == [0, 1, 0]


def test_tokens_of_one_character_are_parted_by_the_prompts_own() -> None:
    """Unigram gives the same characters for all bytes of a run that it does not know."""
    tokenizer = tokenizer_of(FAMILIES["unigram"])
    made = tokenize(tokenizer, "é日", [(1, 2)])
    assert len(made.ids) >= 5 and made.seams == 0
    assert sum(made.learnt) == 3, "the bytes of the second character"


def test_spaces_at_the_ends_of_a_reply_are_learnt() -> None:
    tokenizer = tokenizer_of(FAMILIES["byte level"])
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    made = tokenize(tokenizer, "ab: yes  no", [(3, 8)])
    tokens = tokenizer.convert_ids_to_tokens(made.ids)
    assert [t for t, now in zip(tokens, made.learnt, strict=True) if now] == ["Ġyes", "Ġ"]


@pytest.mark.parametrize("template", [CHAT, CHATML])
@pytest.mark.parametrize("family", [*FAMILIES])
def test_slow_tokenizer_learns_what_a_fast_one_does(
    tmp_path: Path, family: str, template: str
) -> None:
    tokenizer = tokenizer_of(FAMILIES[family], template)
    fast = trained(tmp_path, tokenizer, {"messages": TURNS})
    with mock.patch.object(type(tokenizer), "is_fast", new=False):
        slow = trained(tmp_path, tokenizer, {"messages": TURNS})
    assert slow == fast


def test_reasoning_has_to_be_in_what_is_learnt(tmp_path: Path) -> None:
    """A template that knows reasoning may leave out that of earlier turns, not that of a reply."""
    shown = (
        "{% if m.reasoning_content and (loop.last or show) %}{{ m.reasoning_content }}{% endif %}"
    )
    replies = CHAT.replace("{{ m.content }}", shown + "{{ m.content }}")
    turns = [TURNS[0], {**TURNS[1], "reasoning_content": "word"}]

    def learnt(template: str) -> int:
        tokenizer = tokenizer_of(FAMILIES["byte level"], template)
        return sum(trained(tmp_path, tokenizer, {"messages": turns})[1])

    assert learnt(replies) == learnt(replies.replace("loop.last", "true"))
    with pytest.raises(DataError, match=r"does not write 'reasoning_content' of messages\[1\]"):
        learnt(replies.replace("loop.last", "false"))


def test_text_is_not_given_a_begin_token_that_sampling_does_not_give(tmp_path: Path) -> None:
    class Bare(ByteTokenizer):
        """Has a begin token, and does not begin texts with it."""

        def __call__(self, text: str, *, add_special_tokens: bool, **options: Any) -> Any:
            return super().__call__(text, add_special_tokens=False, **options)

    for tokenizer, begin in ((ByteTokenizer(), [BEGIN]), (Bare(), [])):
        ids, _ = trained(tmp_path, tokenizer, {"prompt": "a", "completion": "b"})
        assert ids == [*begin, *b"ab", END]
        assert prompt_tokens("m", tokenizer, {"text": "a"}) == [*begin, *b"a"]
