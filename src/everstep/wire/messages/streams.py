"""Sample streams: the events of a sample while it is drawn.

Decoding proceeds by position: at each, every sequence that has not ended draws one token. The
tokens of a position are one event. A client that lost the connection requests the next positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from everstep.wire.base import Response

Topk = list[tuple[int, float]]


class DrawnToken(Response):
    """One token of one sequence.

    Attributes:
        sequence: the index of its sequence.
        position: its index in the sequence.
        token: its id.
        logprob: a float32 under the model's own distribution.
        topk_logprobs: the likeliest tokens at its position, if `topk_sample_logprobs` is set.
    """

    sequence: int
    position: int
    token: int
    logprob: float
    topk_logprobs: Topk | None = None


class DrawnTokens(Response):
    """The tokens drawn at one position, one for each sequence that had not ended before it."""

    position: int
    tokens: list[DrawnToken]


Grown = tuple[Sequence[int], Sequence[float], Sequence[Topk | None] | None]
"""A sequence so far: tokens, logprobs and, if requested, likeliest tokens."""


def drawn_since(position: int, sequences: Sequence[Grown], first: int = 0) -> list[DrawnTokens]:
    """Return the tokens of sequences from a position on, position by position.

    Args:
        position: the first position to return.
        sequences: the sequences.
        first: position of their first elements, where only their ends are given.
    """
    longest = max((len(tokens) for tokens, _, _ in sequences), default=0)
    return [
        DrawnTokens(
            position=first + at,
            tokens=[
                DrawnToken(
                    sequence=index,
                    position=first + at,
                    token=tokens[at],
                    logprob=logprobs[at],
                    topk_logprobs=topk[at] if topk is not None else None,
                )
                for index, (tokens, logprobs, topk) in enumerate(sequences)
                if at < len(tokens)
            ],
        )
        for at in range(max(0, position - first), longest)
    ]
