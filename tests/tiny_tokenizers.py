"""Tiny tokenizers of every family, with the chat template of your choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
"""Ends a generation prompt with a space, which SentencePiece joins with the word after it."""

_WORDS = ("user", "assistant", "yes", "no", "ab", "word", "to")


def byte_level() -> Tokenizer:
    """BPE of bytes, as GPT-2's, with some words merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet]
    merges = _merges(tokens, "Ġ")
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def byte_fallback() -> Tokenizer:
    """BPE of characters after SentencePiece's spaces, with bytes for the rest, as Llama 2's."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += map(chr, range(33, 127))
    merges = _merges(tokens, "▁")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def unigram() -> Tokenizer:
    """SentencePiece's Unigram, with bytes for the rest, as T5's and Gemma's."""
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(chr(code), -8.0) for code in range(33, 127)] + [("▁", -6.0)]
    pieces += [(word, -4.0) for each in _WORDS for word in (each, "▁" + each)]
    made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return made


def word_piece() -> Tokenizer:
    """WordPiece, which forgets spaces and case, begins with ``<s>`` and ends with ``</s>``."""
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*SPECIAL, *characters, *("##" + each for each in characters), *_WORDS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "word piece": word_piece,
}


def tokenizer_of(family: Callable[[], Tokenizer], template: str | None = CHAT) -> Any:
    """Return a tokenizer of a family as transformers has it."""
    made = family()
    made.add_special_tokens([AddedToken(each, special=True) for each in SPECIAL])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    whole.chat_template = template
    return whole


def _merges(tokens: list[str], space: str) -> list[tuple[str, str]]:
    """Add the words to the tokens, with and without a space, and return the merges to them."""
    merges = []
    for word in _WORDS:
        steps = [(word[:length], word[length]) for length in range(1, len(word))]
        for pair in [*steps, (space, word)]:
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    return merges
