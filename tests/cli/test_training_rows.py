"""Rows of training files: the fields that are honoured, and the refusal of all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from everstep.cli.train.data import Source, read_examples
from everstep.cli.train.examples import Completion, Conversation, DataError, Text

GOOD = {"prompt": "p", "completion": "c"}
ASK = {"role": "user", "content": "Q"}
SAY = {"role": "assistant", "content": "A"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def read(tmp_path: Path, *lines: object, ignore: tuple[str, ...] = ()) -> Source:
    """Read a file of lines, each of them text or JSON."""
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return read_examples(path, ignore)


def conversation(tmp_path: Path, row: dict[str, Any], **options: Any) -> Conversation:
    """Read a row that is a conversation."""
    [example] = read(tmp_path, row, **options).examples
    assert isinstance(example, Conversation)
    return example


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{nope"], r"data.jsonl:1: is not JSON"),
        (["[" * 100_000], r"data.jsonl:1: is not JSON"),
        (['{"prompt": "a", "prompt": "b", "completion": "c"}'], r":1: .*'prompt' is there twice"),
        (['{"prompt": "\\ud800", "completion": "c"}'], r"data.jsonl:1: has half of a character"),
        ([GOOD, "", '["a"]'], r"data.jsonl:3: a line is .*no object"),
        ([GOOD, {"prompt": "p"}], r"data.jsonl:2: a line is .*this one has the keys 'prompt'"),
        ([{**GOOD, "messages": [SAY]}], r"data.jsonl:1: a line is"),
        ([{"prompt": 1, "completion": "c"}], r"data.jsonl:1: prompt and completion must be"),
        ([{"prompt": [ASK], "completion": "c"}], r"data.jsonl:1: prompt and completion must be"),
        ([{"prompt": "p", "completion": ""}], r"data.jsonl:1: completion is empty"),
        ([{"text": ""}], r"data.jsonl:1: text must be"),
        ([{"messages": []}], r"data.jsonl:1: messages must be a list"),
        ([{"messages": [ASK]}], r"data.jsonl:1: no message has"),
        ([{"messages": [{"role": "assistant"}]}], r"messages\[0\]: the assistant says nothing"),
        ([{"messages": [{"role": "user"}, SAY]}], r"data.jsonl:1: messages\[0\]: has no content"),
        ([{"messages": ["hi", SAY]}], r"data.jsonl:1: messages\[0\]: a message is"),
        ([{"messages": [ASK, {**SAY, "content": 7}]}], r":1: messages\[1\].content has to be"),
        ([{"messages": [ASK, {**SAY, "weight": 0.5}]}], r":1: messages\[1\]: weight is 0 or 1"),
        ([{"messages": [ASK, {**SAY, "weight": 0, "train": True}]}], r"say different things"),
        ([{"messages": [ASK, {**SAY, "weight": 0}]}], r"data.jsonl:1: no message has"),
        ([{"messages": [{**ASK, "weight": 1}, SAY]}], r"messages\[0\]: only turns of the assist"),
        ([{"messages": [ASK, SAY], "tools": 3}], r"data.jsonl:1: tools must be a list"),
        ([{"messages": [ASK, SAY], "tools": "{"}], r"data.jsonl:1: tools is not JSON"),
        ([{"messages": [ASK, SAY], "chat_template_kwargs": 1}], r"kwargs must be an object"),
        ([{"conversations": [{"from": "human"}]}], r"conversations\[0\]: a turn is"),
        (
            [{"conversations": [{"from": "function_call", "value": "f(1)"}]}],
            r"data.jsonl:1: conversations\[0\]: the function call is not JSON",
        ),
        (
            [{"messages": [ASK, {"role": "assistant", "tool_calls": [{**CALL, "function": 1}]}]}],
            r":1: messages\[1\].tool_calls\[0\] has no function",
        ),
        ([" "], r"data.jsonl: is empty"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, lines: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(tmp_path, *lines)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rejected": "no"}, "'rejected' is of a preference pair"),
        ({"preferred_output": [SAY]}, "'preferred_output' is of a preference pair"),
        ({"label": True}, "'label' says whether a completion is good"),
        ({"label": False}, "'label' says whether a completion is good"),
        ({"labels": [1]}, "'labels' holds tokens"),
        ({"images": ["a.png"]}, "'images' holds other content than text"),
        ({"system": "Be brief."}, "'system' is not known"),
        ({"tools": [{"type": "function"}]}, "'tools' is not known"),
        ({"weight": 0}, "'weight' is not known"),
        ({"reward": 0.0}, "'reward' is not known"),
        ({"instruction": "Do."}, "'instruction' is of the form of Alpaca"),
    ],
)
def test_field_that_cannot_be_honoured_is_refused_unless_ignored(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    [name] = fields
    with pytest.raises(DataError, match=f"data.jsonl:2: {says}.*give --ignore {name}"):
        read(tmp_path, GOOD, {**GOOD, **fields})

    ignored = read(tmp_path, {**GOOD, **fields}, ignore=(name,))
    assert ignored.examples == read(tmp_path, GOOD).examples
    assert ignored.ignored == {name: 1}
    assert read(tmp_path, {**GOOD, name: None}).examples == read(tmp_path, GOOD).examples


def test_labels_of_rows_and_messages_are_ignored_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": [ASK, {**SAY, "id": n}], "id": n, "source": "x"} for n in range(3)]

    source = read(tmp_path, *rows)

    assert source.ignored == {"id": 6, "source": 3}
    assert source.examples[0] == conversation(tmp_path, {"messages": [ASK, SAY]})


def test_fields_of_messages_are_kept_for_the_template(tmp_path: Path) -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "R"}
    result = {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "c1"}
    tools = [{"type": "function", "function": {"name": "f"}}]

    made = conversation(
        tmp_path,
        {
            "messages": [{**ASK, "name": "ann"}, asked, result, SAY],
            "tools": tools,
            "parallel_tool_calls": True,
            "chat_template_kwargs": {"thinking": True},
        },
    )

    user, call, answer, _ = made.messages
    assert user == {**ASK, "name": "ann"}
    assert call["reasoning_content"] == "R" and call["content"] == ""
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert answer == {"role": "tool", "content": "4", "tool_call_id": "c1"}
    assert made.learnt == (1, 3)
    assert made.variables == {"thinking": True, "tools": tools}


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}])
def test_excluded_turns_are_context(tmp_path: Path, off: dict[str, Any]) -> None:
    on = {"weight": 1, "train": True}
    made = conversation(tmp_path, {"messages": [ASK, {**SAY, **off}, {**ASK, **off}, SAY | on]})
    assert made.learnt == (3,)
    assert made.messages == (ASK, SAY, ASK, SAY)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}],
        [{"type": "text"}],
        [{"type": "text", "text": "a", "annotations": [1]}],
        ["a"],
        {"type": "text"},
    ],
)
def test_content_other_than_text_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:1: messages\[0\]\.content"):
        read(tmp_path, {"messages": [{**ASK, "content": content}, SAY]})


def test_prompt_and_completion_may_be_messages(tmp_path: Path) -> None:
    made = conversation(tmp_path, {"prompt": [ASK, SAY, ASK], "completion": [SAY]})
    assert made.messages == (ASK, SAY, ASK, SAY)
    assert made.learnt == (3,), "a reply in the prompt is context"


def test_sharegpt_is_read_as_messages(tmp_path: Path) -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = [("human", "Q"), ("function_call", call), ("observation", "4"), ("gpt", "A")]

    made = conversation(
        tmp_path,
        {
            "conversations": [{"from": who, "value": what} for who, what in turns],
            "system": "S",
            "tools": '[{"name": "f"}]',
        },
    )

    assert [each["role"] for each in made.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert made.messages[0]["content"] == "S"
    assert made.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert made.learnt == (2, 4)
    assert made.variables == {"tools": [{"name": "f"}]}
    off = {"from": "gpt", "value": "A", "weight": 0}
    said = {"from": "human", "value": "Q"}
    on = {**off, "weight": 1}
    assert conversation(tmp_path, {"conversations": [said, off, said, on]}).learnt == (3,)


def test_text_rows_are_texts(tmp_path: Path) -> None:
    [first, second] = read(tmp_path, {"text": "a"}, GOOD).examples
    assert isinstance(first, Text) and first.text == "a"
    assert isinstance(second, Completion) and second.where.endswith("data.jsonl:2")


def test_byte_order_marks_and_windows_line_ends_are_not_data(tmp_path: Path) -> None:
    path, plain = tmp_path / "bom.jsonl", tmp_path / "plain.jsonl"
    line = json.dumps(GOOD).encode()
    plain.write_bytes(line + b"\n" + line)
    mark = "\ufeff".encode()
    path.write_bytes(mark + line + b"\r\n" + mark + line + b"\r\n")
    texts = [
        [(each.prompt, each.completion) for each in read_examples(one).examples]  # type: ignore[union-attr]
        for one in (path, plain)
    ]
    assert texts[0] == texts[1] == [("p", "c")] * 2
    book = tmp_path / "book.txt"
    book.write_bytes(mark + b"one\r\ntwo")
    [example] = read_examples(book).examples
    assert isinstance(example, Text) and example.text == "one\ntwo"


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.txt: can't be read: No such file"):
        read_examples(tmp_path / "absent.txt")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\ncaf\xe9")
    with pytest.raises(DataError, match=r"latin.jsonl:2: is not UTF-8 text"):
        read_examples(tmp_path / "latin.jsonl")
    (tmp_path / "wide.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(DataError, match=r"wide.jsonl: is not UTF-8 text but UTF-16; convert it"):
        read_examples(tmp_path / "wide.jsonl")
    for name, says in (("table.csv", "to_json"), ("rows.json", "jq"), ("a.bin", "$")):
        with pytest.raises(DataError, match=rf"{name}: give a .txt or a .jsonl file.*{says}"):
            read_examples(tmp_path / name)
