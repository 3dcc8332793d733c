"""Tokens and masks: a whole text is tokenized once, and each token is learnt or context.

Pieces tokenized apart differ from the whole in most families of tokenizers: SentencePiece begins
each piece with a space of its own, and merges end at the seams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everstep.conversations import Tokenizer, encode

Span = tuple[int, int]


@dataclass(frozen=True)
class Tokenized:
    """A tokenized text.

    Attributes:
        ids: the tokens.
        learnt: for each of them 1 if it is learnt, otherwise 0.
        seams: number of learnt spans that begin within a token.
    """

    ids: list[int]
    learnt: list[int]
    seams: int = 0


def tokenize(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Tokenized:
    """Tokenize a text, without tokens that the tokenizer adds.

    A token with characters of a learnt span is learnt, also one that begins before it, unless the
    text up to the span has that token at its end anyway.

    Args:
        tokenizer: fast, so that it gives each token's characters. For a slow one a span begins
            where the tokens of the text before it differ from those of the whole.
        text: the text.
        spans: the characters that are learnt, in order.

    Raises:
        ConversationError: the tokenizer refuses the text.
    """
    fast = getattr(tokenizer, "is_fast", False)
    options = {"return_offsets_mapping": True} if fast else {}
    encoded = encode(tokenizer, text, **options)
    ids = list(encoded["input_ids"])
    offsets = [tuple(each) for each in encoded["offset_mapping"]] if fast else None
    learnt, seams = [0] * len(ids), 0
    for span in spans:
        first, last, within = _range(tokenizer, text, span, ids, offsets)
        learnt[first:last] = [1] * (last - first)
        seams += within
    return Tokenized(ids, learnt, seams)


def _range(
    tokenizer: Tokenizer, text: str, span: Span, ids: list[int], offsets: list[Span] | None
) -> tuple[int, int, bool]:
    """Return the first learnt token of a span, the one after its last, and whether it is a seam."""
    begin, stop = span
    if offsets is None:
        first, parted = _common(tokenizer, text[:begin], ids)
        last, whole = _common(tokenizer, text[:stop], ids)
        return first, last if whole else min(last + 1, len(ids)), not parted
    inside = [
        index
        for index, (start, end) in enumerate(offsets)
        # Some tokenizers trim spaces off the characters of a token, and leave none of a space.
        if end > begin and (start < stop or (start == end == stop))
    ]
    if not inside:
        return 0, 0, False
    first, parted = inside[0], True
    if begin and offsets[first][0] < begin:
        common, parted = _common(tokenizer, text[:begin], ids)
        first = common if parted else first
    return first, inside[-1] + 1, not parted


def _common(tokenizer: Tokenizer, prefix: str, ids: Sequence[int]) -> tuple[int, bool]:
    """Return how many tokens a prefix's own begin with, and whether those are all of its own."""
    own = list(encode(tokenizer, prefix)["input_ids"])
    count = 0
    while count < min(len(own), len(ids)) and own[count] == ids[count]:
        count += 1
    return count, count == len(own)
