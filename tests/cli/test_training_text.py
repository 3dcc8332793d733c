"""Examples as datums: learnt tokens and their positions, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from everstep import Datum
from everstep.cli.quickstart.run import MAX_LENGTH
from everstep.cli.train.data import read_examples
from everstep.cli.train.examples import Completion, DataError
from everstep.cli.train.loop import Batches
from everstep.cli.train.options import MAX_DROPPED
from everstep.cli.train.prepare import Prepared, Prompt, first_prompt, prepare
from tests.cli.byte_tokenizer import BEGIN, END, ByteTokenizer


def jsonl(tmp_path: Path, *lines: object) -> Path:
    """Write a file of lines, each of them text or JSON."""
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def prepared(path: Path, tokenizer: ByteTokenizer, max_length: int) -> Prepared:
    """Prepare the examples of a file."""
    return prepare(read_examples(path).examples, tokenizer, max_length)


def parts(datum: Datum) -> tuple[list[int], list[int], list[float]]:
    """Inputs, targets and weights of a datum."""
    inputs = datum.loss_fn_inputs
    return (
        datum.model_input.to_ints(),
        inputs["target_tokens"].tolist(),
        inputs["weights"].tolist(),
    )


def learnt(made: Iterable[Datum]) -> list[str]:
    """The text of each datum that counts in the loss."""
    return [
        bytes(
            token
            for token, weight in zip(*parts(datum)[1:], strict=True)
            if weight == 1 and token < BEGIN
        ).decode()
        for datum in made
    ]


def test_targets_are_shifted_by_one_and_only_the_completion_counts(
    tmp_path: Path, tokenizer: ByteTokenizer
) -> None:
    path = jsonl(tmp_path, {"prompt": "ab", "completion": "cd"})

    [datum] = prepared(path, tokenizer, 100).datums

    given, asked, weights = parts(datum)
    assert given == [BEGIN, *b"abcd"]
    assert asked == [*b"abcd", END]
    assert weights == [0, 0, 1, 1, 1]


def test_every_token_of_a_text_is_learnt_once(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    path = tmp_path / "book.txt"
    path.write_text("0123456789" * 5)

    made = prepared(path, tokenizer, 7).datums

    assert [token for each in made for token in parts(each)[1]] == [*b"0123456789" * 5, END]
    assert all(len(parts(each)[0]) <= 7 for each in made)
    assert all(weight == 1 for each in made for weight in parts(each)[2])


Messages = list[dict[str, str]]
Template = Callable[[Messages, bool], str]
CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def bracketed(messages: Messages, reply: bool) -> str:
    """Render each message with its role in brackets."""
    text = "<begin>" + "".join(f"[{m['role']}]{m['content']}|" for m in messages)
    return text + ("[assistant]" if reply else "")


def forgetful(messages: Messages, reply: bool) -> str:
    """Leave out the reasoning of all replies but the last, as many templates do."""
    last = len(messages) - 1
    return bracketed(
        [
            {**m, "content": m["content"].removeprefix("think ")} if i != last or reply else m
            for i, m in enumerate(messages)
        ],
        reply,
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [(bracketed, "A1|A2|"), (None, "A1A2")],
    ids=["template", "none"],
)
def test_only_assistant_turns_are_learnt(
    tmp_path: Path,
    templated: Callable[[Template | None], ByteTokenizer],
    template: Template | None,
    expected: str,
) -> None:
    path = jsonl(tmp_path, {"messages": CONVERSATION})

    made = prepared(path, templated(template), 1000).datums

    assert learnt(made) == [expected]


def test_template_that_rewrites_earlier_turns_gives_a_sequence_for_each(
    tmp_path: Path, templated: Callable[[Template], ByteTokenizer]
) -> None:
    turns = [
        {**m, "content": "think " * (m["role"] == "assistant") + m["content"]} for m in CONVERSATION
    ]

    made = prepared(jsonl(tmp_path, {"messages": turns}), templated(forgetful), 1000).datums

    assert learnt(made) == ["think A1|", "think A2|"]
    assert bytes(parts(made[1])[0][1:]).startswith(b"[system]S|[user]Q1|[assistant]A1|[user]Q2|")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (lambda m, r: "no", r":2: .* does not write 'content' of messages\[0\] .*--ignore content"),
        (lambda m, r: bracketed(m, r) + "<think>" * r, r":2: .* prompt .*ends with .*<think>"),
    ],
    ids=["writes nothing", "prompts otherwise"],
)
def test_template_that_cannot_be_trained_with_is_told(
    tmp_path: Path,
    templated: Callable[[Template], ByteTokenizer],
    template: Template,
    says: str,
) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"messages": CONVERSATION}]
    with pytest.raises(DataError, match=says):
        prepared(jsonl(tmp_path, *rows), templated(template), 1000)


def test_conversation_is_tokenised_as_its_template_renders_it(
    tmp_path: Path, templated: Callable[[Template | None], ByteTokenizer]
) -> None:
    path = jsonl(tmp_path, {"messages": CONVERSATION})

    [datum] = prepared(path, templated(bracketed), 1000).datums

    given, asked, _ = parts(datum)
    whole = bracketed(CONVERSATION, False).removeprefix("<begin>").encode()
    assert [*given, asked[-1]] == [BEGIN, *whole]  # one begin token, not two


def test_kept_cut_and_dropped_examples_are_told(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    rows = [{"prompt": "x" * n, "completion": "y" * 9} for n in (50, 1, 15, 60, 70, 80)]
    path = jsonl(tmp_path, *rows)

    made = prepared(path, tokenizer, 20)

    assert learnt(made.datums) == ["y" * 9, "y" * 5]
    assert made.counts() == {"kept": 2, "cut": 1, "dropped": 4}
    assert made.report() == (
        "2 of 6 examples kept, as 2 sequences; 1 cut at 20 tokens, without the end "
        f"({path}:3); 4 dropped: nothing learnt in their first 20 tokens ({path}:1, "
        f"{path}:4, {path}:5 and 1 more); the longest needs --max-length 90"
    )
    made.check_dropped(0.67)
    with pytest.raises(DataError, match=r"4 of 6 .*:1, .*--max-length 90;.* --max-dropped 0.67"):
        made.check_dropped(0.66)
    whole = prepared(path, tokenizer, 90)
    assert whole.report() == "all of 6 examples kept, as 6 sequences"
    whole.check_dropped(0)


def test_data_without_learnt_tokens_is_an_error_with_advice(
    tmp_path: Path, tokenizer: ByteTokenizer
) -> None:
    path = jsonl(tmp_path, {"prompt": "x" * 50, "completion": "y"})

    with pytest.raises(
        DataError, match=r"first 20 tokens; .*--max-length 52\. Shorten the prompts"
    ):
        prepared(path, tokenizer, 20)


def test_begin_token_that_a_text_has_is_not_doubled(
    tmp_path: Path, tokenizer: ByteTokenizer
) -> None:
    path = jsonl(tmp_path, {"text": "<begin>ab<end>"}, {"prompt": "<begin>a", "completion": "b"})

    first, second = (parts(each) for each in prepared(path, tokenizer, 100).datums)

    assert first[:2] == second[:2] == ([BEGIN, *b"ab"], [*b"ab", END])
    assert (first[2], second[2]) == ([1, 1, 1], [0, 1, 1])


def test_default_data_is_signatures_with_docstrings(tokenizer: ByteTokenizer) -> None:
    examples = read_examples(None).examples

    assert len(examples) > 300
    for example in examples:
        assert isinstance(example, Completion)
        assert example.prompt.startswith("def ")
        assert example.completion.startswith('    """')
    prepare(examples[::8], tokenizer, MAX_LENGTH).check_dropped(MAX_DROPPED)


def test_first_prompt_is_that_of_the_first_example(
    tmp_path: Path, tokenizer: ByteTokenizer
) -> None:
    def prompt(path: Path) -> Prompt:
        return first_prompt(read_examples(path).examples, tokenizer)

    path = jsonl(tmp_path, {"prompt": "Why?", "completion": "Because."})
    assert prompt(path) == Prompt("Why?", [BEGIN, *b"Why?"])
    (tmp_path / "book.txt").write_text("It was a dark and stormy night")
    assert prompt(tmp_path / "book.txt").text == "It was a dark"
    path = jsonl(tmp_path, {"messages": CONVERSATION})
    assert prompt(path).text == "system: S\nuser: Q1\nassistant: "
    tokenizer.chat_template = bracketed
    text = "[system]S|[user]Q1|[assistant]"
    assert prompt(path) == Prompt("<begin>" + text, [BEGIN, *text.encode()])


def test_batch_depends_on_step_number_alone(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    lines = [{"prompt": "p", "completion": f"{number}"} for number in range(10)]
    made = prepared(jsonl(tmp_path, *lines), tokenizer, 100).datums

    batches = Batches(made, 4, seed=3)

    assert batches[7] == Batches(made, 4, seed=3)[7]
    assert batches[0] != batches[1]
    seen = [text for step in range(5) for text in learnt(batches[step])]
    assert sorted(seen) == sorted(f"{number}" for number in range(10) for _ in range(2))
    assert Batches(made[:3], 4, seed=3).size == 3
