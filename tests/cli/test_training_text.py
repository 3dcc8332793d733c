"""Data for the quickstart: what is learnt, at which position, and what is refused."""

import json

import pytest

from everstep.cli.training_loop import Batches
from everstep.cli.training_text import DataError, datums, first_prompt, read_examples

BEGIN, END = 256, 257


def jsonl(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def parts(datum):
    inputs = datum.loss_fn_inputs
    return (
        datum.model_input.to_ints(),
        inputs["target_tokens"].tolist(),
        inputs["weights"].tolist(),
    )


def learnt(made):
    """The text that counts in the loss."""
    return [
        bytes(
            token
            for token, weight in zip(*parts(datum)[1:], strict=True)
            if weight == 1 and token < BEGIN
        ).decode()
        for datum in made
    ]


def test_position_i_is_asked_for_token_i_plus_1_and_only_the_completion_counts(tmp_path, tokenizer):
    path = jsonl(tmp_path, {"prompt": "ab", "completion": "cd"})

    [datum] = datums(read_examples(path), tokenizer, 100)

    given, asked, weights = parts(datum)
    assert given == [BEGIN, *b"abcd"]
    assert asked == [*b"abcd", END]
    assert weights == [0, 0, 1, 1, 1]


def test_every_token_of_a_text_is_learnt_exactly_once(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("0123456789" * 5)

    made = datums(read_examples(path), tokenizer, 7)

    assert [token for each in made for token in parts(each)[1]] == [*b"0123456789" * 5, END]
    assert all(len(parts(each)[0]) <= 7 for each in made)
    assert all(weight == 1 for each in made for weight in parts(each)[2])


CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]


def bracketed(messages, reply):
    text = "<begin>" + "".join(f"[{m['role']}]{m['content']}|" for m in messages)
    return text + ("[assistant]" if reply else "")


def forgetful(messages, reply):
    """Writes out only the last reply, as templates that drop earlier reasoning do."""
    last = len(messages) - 1
    shown = [
        {**m, "content": "…"} if m["role"] == "assistant" and i != last else m
        for i, m in enumerate(messages)
    ]
    return bracketed(shown, reply)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(bracketed, "A1|A2|"), (forgetful, "A2|"), (None, "A1A2"), (lambda m, r: "no", "A1A2")],
    ids=["template", "template that rewrites earlier turns", "none", "template of no use"],
)
def test_only_the_assistants_words_are_learnt(tmp_path, templated, template, expected):
    path = jsonl(tmp_path, {"messages": CONVERSATION})

    made = datums(read_examples(path), templated(template), 1000)

    assert learnt(made) == [expected]


def test_a_conversation_is_tokenised_as_its_template_writes_it(tmp_path, templated):
    path = jsonl(tmp_path, {"messages": CONVERSATION})

    [datum] = datums(read_examples(path), templated(bracketed), 1000)

    given, asked, _ = parts(datum)
    whole = bracketed(CONVERSATION, False).removeprefix("<begin>").encode()
    assert [*given, asked[-1]] == [BEGIN, *whole]  # one begin token, not two


def test_an_example_whose_completion_does_not_fit_is_left_out(tmp_path, tokenizer):
    path = jsonl(
        tmp_path,
        {"prompt": "x" * 50, "completion": "y"},
        {"prompt": "x", "completion": "short"},
    )

    assert learnt(datums(read_examples(path), tokenizer, 20)) == ["short"]


def test_nothing_left_to_learn_is_an_error_that_says_what_to_do(tmp_path, tokenizer):
    path = jsonl(tmp_path, {"prompt": "x" * 50, "completion": "y"})

    with pytest.raises(DataError, match="first 20 tokens; shorten the prompts"):
        datums(read_examples(path), tokenizer, 20)


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{nope"], r"data.jsonl:1: is not JSON"),
        ([GOOD, "", '["a"]'], r"data.jsonl:3: a line is .*no object"),
        ([GOOD, {"prompt": "p"}], r"data.jsonl:2: a line is .*this one has the keys 'prompt'"),
        ([{"prompt": 1, "completion": "c"}], r"data.jsonl:1: prompt and completion must be"),
        ([{"prompt": "p", "completion": ""}], r"data.jsonl:1: completion is empty"),
        ([{"messages": []}], r"data.jsonl:1: messages must be a list"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], r"data.jsonl:1: no message has"),
        ([{"messages": [{"role": "assistant"}]}], r"data.jsonl:1: a message is"),
        ([" "], r"data.jsonl: is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, says):
    with pytest.raises(DataError, match=says):
        read_examples(jsonl(tmp_path, *lines))


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.txt: can't be read: No such file"):
        read_examples(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin.txt: is not UTF-8 text"):
        read_examples(tmp_path / "latin.txt")
    with pytest.raises(DataError, match=r"table.csv: give a .txt or a .jsonl"):
        read_examples(tmp_path / "table.csv")


def test_without_a_file_docstrings_are_learnt_from_signatures(tokenizer):
    examples = read_examples(None)

    assert len(examples) > 300
    for example in examples:
        signature, docstring = example.segments
        assert signature.text.startswith("def ")
        assert not signature.learnt
        assert docstring.text.startswith('    """')
        assert docstring.learnt
    assert datums(examples[:3], tokenizer, 256)


def test_a_sample_begins_with_the_first_examples_prompt(tmp_path, tokenizer):
    path = jsonl(tmp_path, {"prompt": "Why?", "completion": "Because."})
    assert first_prompt(read_examples(path), tokenizer) == "Why?"
    (tmp_path / "book.txt").write_text("It was a dark and stormy night")
    assert first_prompt(read_examples(tmp_path / "book.txt"), tokenizer) == "It was a dark"


def test_a_steps_batch_depends_on_its_number_alone(tmp_path, tokenizer):
    lines = [{"prompt": "p", "completion": f"{number}"} for number in range(10)]
    made = datums(read_examples(jsonl(tmp_path, *lines)), tokenizer, 100)

    batches = Batches(made, 4, seed=3)

    assert batches[7] == Batches(made, 4, seed=3)[7]
    assert batches[0] != batches[1]
    seen = [text for step in range(5) for text in learnt(batches[step])]
    assert sorted(seen) == sorted(f"{number}" for number in range(10) for _ in range(2))
    assert Batches(made[:3], 4, seed=3).size == 3
