"""The text of a completion as it grows is the text that it has in the end."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from everstep.engine.pico import write_pico
from everstep.server.openai.text import CompletionText

END = 257


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("pico") / "pico"
    write_pico(directory)
    assert json.loads((directory / "tokenizer.json").read_text())
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def drawn(told: bytes, stops: list[str]) -> bytes:
    """What the engine draws of it: it ends as soon as there is a stop string."""
    counts = range(1, len(told) + 1)
    ended = (n for n in counts if any(s in told[:n].decode(errors="ignore") for s in stops))
    return told[: next(ended, len(told))]


def expected(told: bytes, stops: list[str]) -> str:
    """The bytes as text, up to the first stop string."""
    text = told.decode(errors="replace")
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@example(text="baa", stops=["a", "baa"])
@given(
    text=st.text(alphabet="abé漢😀", max_size=12),
    stops=st.lists(st.text(alphabet="abé漢", min_size=1, max_size=3), max_size=3),
)
def test_the_parts_are_the_whole_up_to_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    told = drawn(text.encode(), stops)
    grown = CompletionText(tokenizer, stops, {END})
    parts = []
    for token in told:
        part, scored = grown.push(token)
        parts.append(part)
        assert scored is not None
        assert expected(told, stops).startswith("".join(parts)), "nothing is taken back"
    parts.append(grown.end())
    assert "".join(parts) == expected(told, stops) == grown.text


@given(st.binary(max_size=12))
def test_a_character_that_is_cut_is_shown_as_such_at_the_end(
    tokenizer: Tokenizer, told: bytes
) -> None:
    grown = CompletionText(tokenizer, [], {END})
    parts = [grown.push(token)[0] for token in told]
    assert "".join(parts) + grown.end() == tokenizer.decode(list(told), skip_special_tokens=True)


def test_an_end_token_says_nothing(tokenizer: Tokenizer) -> None:
    grown = CompletionText(tokenizer, [], {END})
    assert grown.push(ord("a"))[0] == "a"
    assert grown.push(END) == ("", None)
    assert grown.end() == ""


def test_a_stop_string_in_the_prompt_stops_nothing(tokenizer: Tokenizer) -> None:
    grown = CompletionText(tokenizer, ["ab"], {END})
    prompt = [grown.push(token)[0] for token in b"xab"]
    grown.begin()
    parts = [grown.push(token)[0] for token in b"b ab"]
    assert "".join([*prompt, *parts]) + grown.end() == "xabb "
