"""Results with arrays: training passes and samples.

The engine makes a `SampleOutput`, which the codecs encode. Scripts read a `SampleResponse`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from everstep.wire.messages.tensors import TensorData

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

StopReason = Literal["length", "stop"]
NO_TOPK = -99999.0
"""The logprob of an empty cell of top-k results."""
_EMPTY_CELL = (0, NO_TOPK)


class Stop(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """The result of a training pass: named tensors per datum, and metrics ``name:reduction``."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TopkLogprobs:
    """The k likeliest tokens per position: two [n, k] arrays. An empty cell is (0, -99999)."""

    token_ids: Array
    logprobs: Array


@dataclass(frozen=True)
class PromptAltTokens:
    """Tokens drawn at every prompt position after the first: two [P - 1, k] tensors."""

    tokens: TensorData
    logprobs: TensorData


@dataclass(frozen=True)
class SampledSequence:
    """A sampled sequence, as arrays (``…_np``) and as lists."""

    stop_reason: StopReason
    sequence_id: str = ""
    tokens_np: Array | None = field(default=None, repr=False)
    logprobs_np: Array | None = field(default=None, repr=False)
    topk_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return (
            f"SampledSequence({len(self.tokens)} tokens, stop_reason={self.stop_reason!r}, "
            f"sequence_id={self.sequence_id!r})"
        )

    @cached_property
    def tokens(self) -> list[int]:
        """Token ids, including those that stopped it."""
        return [] if self.tokens_np is None else self.tokens_np.tolist()

    @cached_property
    def logprobs(self) -> list[float] | None:
        """A logprob for each token, under the model's own distribution."""
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @cached_property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The likeliest tokens at each position."""
        return None if self.topk_logprobs_np is None else _topk_lists(self.topk_logprobs_np)


@dataclass(frozen=True)
class SampleResponse:
    """The result of a sample.

    Attributes:
        seed: that it was drawn with, also if the request named none. The same request with this
            seed gives the same sequences. None if the service does not say.
    """

    sequences: list[SampledSequence]
    prompt_logprobs_np: Array | None = field(default=None, repr=False)
    topk_prompt_logprobs_np: TopkLogprobs | None = field(default=None, repr=False)
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None
    seed: int | None = None

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        """A logprob for each prompt token, or None where there is none, as for the first."""
        if self.prompt_logprobs_np is None:
            return None
        values: list[float] = self.prompt_logprobs_np.tolist()
        return [None if value != value else value for value in values]  # noqa: PLR0124  NaN

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        """The likeliest tokens at each prompt position, or None where there are none."""
        top = self.topk_prompt_logprobs_np
        return None if top is None else _topk_lists(top)


def _topk_lists(top: TopkLogprobs) -> list[list[tuple[int, float]] | None]:
    """Return rows of (id, logprob) without the empty cells at their end, None for an empty row."""
    rows: list[list[tuple[int, float]] | None] = []
    for ids, logprobs in zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True):
        row = list(zip(ids, logprobs, strict=True))
        if row and row[0] == _EMPTY_CELL:
            row = []
        while row and row[-1] == _EMPTY_CELL:
            row.pop()
        rows.append(row or None)
    return rows


CsrLayout = tuple[list[int], list[int]]
"""Row pointers and columns of a sparse tensor's values."""


@dataclass(frozen=True)
class TopkOutput:
    """The k likeliest tokens per position: int32 [n, k] and float32 [n, k]."""

    token_ids: Array
    logprobs: Array


@dataclass(frozen=True)
class SequenceOutput:
    """One sampled sequence: int32 [n] tokens, float32 [n] logprobs."""

    tokens: Array
    logprobs: Array
    stop_reason: Stop
    topk: TopkOutput | None = None


@dataclass(frozen=True)
class SampleOutput:
    """The engine's result of one sample request.

    Attributes:
        sequences: one for each sample.
        prompt_logprobs: float32 [P], NaN where none was computed.
        topk_prompt: over the prompt's P positions.
        target_prompt_logprobs: float32, in the shape of the request's targets.
        target_layout: the sparse layout of the targets to return, or None for all of them.
        prompt_alt: drawn tokens over P - 1 positions.
        prompt_cache_hit_tokens: the number of prompt tokens that were cached by another request.
    """

    sequences: list[SequenceOutput]
    prompt_logprobs: Array | None = None
    topk_prompt: TopkOutput | None = None
    target_prompt_logprobs: Array | None = None
    target_layout: CsrLayout | None = None
    prompt_alt: TopkOutput | None = None
    prompt_cache_hit_tokens: int = 0
