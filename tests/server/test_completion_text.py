"""Incremental detokenization: parts join to the whole text, and each token has its part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from everstep.engine.models.pico import write_pico
from everstep.server.openai.detokenize import CompletionText, Scored, TokenTexts
from tests.server import odd_tokenizers

END = 257
FAMILIES = {build.__name__: build() for build in odd_tokenizers.ALL}
INVALID_RUN = [0x6F, 0x84, 0xDF, 0x9A, 0xD7, 0x74]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("pico") / "pico"
    write_pico(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@dataclass
class Grown:
    """What became of tokens: the parts as they were sent, with the tokens that came with them."""

    parts: list[str]
    scored: list[list[Scored]]
    text: str

    @property
    def tokens(self) -> list[Scored]:
        return [each for part in self.scored for each in part]


def grow(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    stops: Sequence[str] = (),
    *,
    ends: Sequence[int] = (),
    prompt: Sequence[int] = (),
) -> Grown:
    text = CompletionText(TokenTexts(tokenizer), stops, ends, echo=bool(prompt))
    parts, scored = [], []
    for index, token in enumerate([*prompt, *tokens]):
        if prompt and index == len(prompt):
            text.begin()
        parts.append(text.push(token, -0.5, [(token, -0.5)]))
        scored.append(text.take())
    parts.append(text.end())
    scored.append(text.take())
    return Grown(parts, scored, text.text)


def drawn(tokens: bytes, stops: list[str]) -> bytes:
    """Return the tokens that the engine draws, which end with the first stop string."""
    counts = range(1, len(tokens) + 1)
    ended = (n for n in counts if any(s in tokens[:n].decode(errors="ignore") for s in stops))
    return tokens[: next(ended, len(tokens))]


def expected(tokens: bytes, stops: list[str]) -> str:
    """Return the bytes as text, up to the first stop string."""
    text = tokens.decode(errors="replace")
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@example(text="baa", stops=["a", "baa"])
@given(
    text=st.text(alphabet="abé漢😀", max_size=12),
    stops=st.lists(st.text(alphabet="abé漢", min_size=1, max_size=3), max_size=3),
)
def test_streamed_parts_join_to_the_text_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    tokens = drawn(text.encode(), stops)
    grown = grow(tokenizer, tokens, stops)
    assert "".join(grown.parts) == expected(tokens, stops) == grown.text
    for count in range(len(grown.parts)):
        sent = "".join(grown.parts[:count])
        assert expected(tokens, stops).startswith(sent), "nothing is taken back"


@given(st.binary(max_size=12))
def test_incomplete_character_becomes_a_replacement_character_at_the_end(
    tokenizer: Tokenizer, tokens: bytes
) -> None:
    grown = grow(tokenizer, list(tokens))
    assert "".join(grown.parts) == tokenizer.decode(list(tokens), skip_special_tokens=True)


@example(family="byte_fallback", ids=[3 + byte for byte in INVALID_RUN], stops=[], end=False)
@example(family="byte_fallback", ids=[3 + 0x6F, 3 + 0x84, 261], stops=["o"], end=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    ids=st.lists(st.integers(0, 600), max_size=40),
    stops=st.lists(
        st.sampled_from(["a", "the", " ", "é", "\N{REPLACEMENT CHARACTER}"]), max_size=2
    ),
    end=st.booleans(),
)
def test_each_token_has_one_part_of_the_text(
    family: str, ids: list[int], stops: list[str], end: bool
) -> None:
    tokenizer = FAMILIES[family]
    last = odd_tokenizers.token_id(tokenizer, odd_tokenizers.END)
    tokens = [token % tokenizer.get_vocab_size() for token in ids] + [last] * end
    half = len(tokens) // 2
    grown = grow(tokenizer, tokens[half:], stops, ends=[last], prompt=tokens[:half])
    assert [each.token for each in grown.tokens] == tokens
    assert "".join(grown.parts) == grown.text == "".join(each.text for each in grown.tokens)
    for each in grown.tokens:
        assert grown.text[each.offset :].startswith(each.text)
    if end:
        assert grown.tokens[-1].text == ""


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"word_piece"}))
@given(ids=st.lists(st.integers(0, 600), max_size=40))
def test_text_is_the_tokenizers_own_decoding(family: str, ids: list[int]) -> None:
    tokenizer = FAMILIES[family]
    tokens = [token % tokenizer.get_vocab_size() for token in ids]
    assert grow(tokenizer, tokens).text == tokenizer.decode(tokens, skip_special_tokens=True)


@given(st.lists(st.integers(0, 600), max_size=40))
def test_decoder_that_changes_earlier_text_raises_nothing(ids: list[int]) -> None:
    tokenizer = FAMILIES["word_piece"]
    tokens = [token % tokenizer.get_vocab_size() for token in ids]
    assert len(grow(tokenizer, tokens).tokens) == len(tokens)


def test_invalid_bytes_are_replaced_as_the_decoder_does() -> None:
    tokenizer = FAMILIES["byte_fallback"]
    tokens = [3 + byte for byte in INVALID_RUN]
    grown = grow(tokenizer, tokens)
    assert grown.text == tokenizer.decode(tokens) == "\N{REPLACEMENT CHARACTER}" * 6
    assert len(grown.tokens) == 6


def test_endless_invalid_bytes_are_sent_in_bounded_parts() -> None:
    for family, byte in (("byte_fallback", 3 + 0x80), ("byte_level", 255)):
        grown = grow(FAMILIES[family], [byte] * 1000)
        assert max(map(len, grown.parts)) <= 200
        assert len(grown.tokens) == 1000


def test_long_run_of_valid_bytes_is_streamed() -> None:
    tokens = [3 + byte for byte in ("漢" * 100).encode()]
    grown = grow(FAMILIES["byte_fallback"], tokens)
    assert grown.text == "漢" * 100
    assert len([part for part in grown.parts if part]) > 3


def test_token_inside_a_text_keeps_its_space() -> None:
    tokenizer = FAMILIES["byte_fallback"]
    texts = TokenTexts(tokenizer)
    names = ("▁the", "the", "▁", "</s>")
    words = {texts.word(odd_tokenizers.token_id(tokenizer, name)) for name in names}
    assert words == {" the", "the", " ", "</s>"}


def test_end_token_has_no_text(tokenizer: Tokenizer) -> None:
    grown = grow(tokenizer, [ord("a"), END], ends=[END])
    assert [(each.text, each.offset) for each in grown.tokens] == [("a", 0), ("", 1)]
    assert grown.text == "a"


def test_tokens_of_a_stop_string_have_no_text(tokenizer: Tokenizer) -> None:
    grown = grow(tokenizer, b"xab", ["ab"])
    assert [(each.text, each.offset) for each in grown.tokens] == [("x", 0), ("", 1), ("", 1)]


def test_stop_string_in_the_prompt_is_ignored(tokenizer: Tokenizer) -> None:
    grown = grow(tokenizer, b"b ab", ["ab"], prompt=b"xab")
    assert "".join(grown.parts) == grown.text == "xabb "
