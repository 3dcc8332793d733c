"""Where a datum's tokens come from: spans of prompts and of sampled sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class _Span:
    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not self.sequence_id:
            raise ValueError(f"{kind}.sequence_id must not be empty")
        if self.offset < 0 or self.length < 0:
            raise ValueError(
                f"{kind}.offset and .length must be 0 or greater; got {self.offset}, {self.length}"
            )


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan(_Span):
    """Tokens of a sampled sequence's prompt.

    Attributes:
        sequence_id: of a sequence that was sampled from that prompt.
        offset: where in the prompt they begin.
        length: how many.
    """


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan(_Span):
    """Tokens that were sampled.

    Attributes:
        sequence_id: of the sequence.
        offset: where among its sampled tokens they begin.
        length: how many.
    """


ProvenanceSpans = list[PromptProvenanceSpan | SampledProvenanceSpan]


def check_tiling(field: str, spans: Sequence[_Span], length: int) -> None:
    """Raise ValueError unless the spans cover a field of this length, each position once."""
    total = sum(span.length for span in spans)
    if total != length:
        raise ValueError(
            f"the spans of {field} cover {total} positions, but there are {length}; they have to "
            "cover each once, in order"
        )
