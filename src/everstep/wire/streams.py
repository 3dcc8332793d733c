"""A sample as it is drawn: what a service streams while a sample is under way.

Decoding goes by positions: at each, every sequence that has not ended draws one token. What is
drawn at a position is one event; whoever lost the connection asks for the positions that are next.
"""

from __future__ import annotations

from collections.abc import Sequence

from everstep.wire.base import Response

Topk = list[tuple[int, float]]


class DrawnToken(Response):
    """One token of one sequence.

    Attributes:
        sequence: of which sequence, from 0.
        position: its place in it, from 0.
        token: its id.
        logprob: under the model's own distribution; a float32.
        topk_logprobs: the likeliest tokens there, where `topk_sample_logprobs` asked for them.
    """

    sequence: int
    position: int
    token: int
    logprob: float
    topk_logprobs: Topk | None = None


class DrawnTokens(Response):
    """What was drawn at one position: a token of each sequence that had not ended before it."""

    position: int
    tokens: list[DrawnToken]


Grown = tuple[Sequence[int], Sequence[float], Sequence[Topk | None] | None]
"""A sequence so far: tokens, logprobs and, where they were asked for, likeliest tokens."""


def drawn_since(position: int, sequences: Sequence[Grown]) -> list[DrawnTokens]:
    """What sequences hold from a position on, position by position."""
    longest = max((len(tokens) for tokens, _, _ in sequences), default=0)
    return [
        DrawnTokens(
            position=at,
            tokens=[
                DrawnToken(
                    sequence=index,
                    position=at,
                    token=tokens[at],
                    logprob=logprobs[at],
                    topk_logprobs=topk[at] if topk is not None else None,
                )
                for index, (tokens, logprobs, topk) in enumerate(sequences)
                if at < len(tokens)
            ],
        )
        for at in range(position, longest)
    ]
