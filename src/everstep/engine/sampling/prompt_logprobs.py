"""Prompt scores: a prompt's logprobs, top tokens, target logprobs and alternative draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from everstep.engine.models.attention import decoding
from everstep.engine.models.frozen_product import ROW_MULTIPLE
from everstep.engine.models.model import Model
from everstep.engine.run_state import Adapter
from everstep.engine.sampling import token_choice
from everstep.engine.sampling.finite import check_logits
from everstep.engine.sampling.spec import SampleSpec
from everstep.wire.codecs.proto import TopkOutput
from everstep.wire.messages.outputs import NO_TOPK

Array = np.ndarray[Any, Any]
_ROWS = 64
"""Positions whose logits are computed together."""
_PROMPT_STREAM = 2**63
"""Index of the random stream for prompt positions, distinct from those of the samples."""


def first_scored_position(spec: SampleSpec) -> int:
    """Return the first position of a prompt to score, at least 1, or its length."""
    length = len(spec.tokens)
    first = length
    if spec.prompt_logprobs or spec.topk_prompt_logprobs:
        first = _first_logprob(spec)
    if spec.target_prompt_logprobs is not None:
        targeted = np.flatnonzero((spec.target_prompt_logprobs >= 0).any(axis=1))
        first = min(first, int(targeted[0]) + 1) if len(targeted) else first
    return 1 if spec.prompt_alt_tokens_k else first


def _first_logprob(spec: SampleSpec) -> int:
    last_n = spec.prompt_logprobs_last_n
    return max(1, len(spec.tokens) - last_n) if last_n else 1


def score_prompt(
    model: Model,
    hidden: torch.Tensor,
    spec: SampleSpec,
    begin: int = 0,
    adapter: Adapter | None = None,
) -> dict[str, Any]:
    """Score a prompt.

    Args:
        model: computes the logits.
        hidden: the prompt's last hidden states from position ``begin`` on, [P - begin, H].
        spec: the request.
        begin: position of the first state, before the first position to score.
        adapter: the adapter that is bound, if any.

    Returns:
        The fields of a SampleOutput that concern the prompt.

    Raises:
        InputError: logits are not finite.
    """
    length = len(spec.tokens)
    requested = (
        spec.prompt_logprobs
        or spec.topk_prompt_logprobs
        or spec.target_prompt_logprobs is not None
        or spec.prompt_alt_tokens_k
    )
    if not requested:
        return {}
    first = _first_logprob(spec)
    scores = _PromptScores(spec, length)
    positions = range(first_scored_position(spec), length)
    states = hidden[positions.start - 1 - begin : length - 1 - begin]
    for position, logits in zip(positions, _rows_of_logits(model, states, adapter), strict=True):
        scores.add(position, logits, scored=position >= first)
    return scores.fields()


def _rows_of_logits(model: Model, hidden: torch.Tensor, adapter: Adapter | None) -> Iterator[Array]:
    """Compute the logits of states [N, H] one by one, many in a product.

    The products are padded, so that a position's bits don't depend on which others are scored.
    """
    for states in torch.split(hidden, _ROWS):
        padding = -len(states) % ROW_MULTIPLE
        with decoding(()):
            padded = model.logits(torch.nn.functional.pad(states, (0, 0, 0, padding)))
        logits = padded[: len(states)].cpu().numpy()
        check_logits(logits, adapter)
        yield from logits


class _PromptScores:
    """Collects the requested scores position by position."""

    def __init__(self, spec: SampleSpec, length: int) -> None:
        self._spec = spec
        k, alt = spec.topk_prompt_logprobs, spec.prompt_alt_tokens_k
        self._logprobs = np.full(length, np.nan, dtype=np.float32)
        self._top = TopkOutput(
            np.zeros((length, k), dtype=np.int32), np.full((length, k), NO_TOPK, dtype=np.float32)
        )
        targets = spec.target_prompt_logprobs
        self._targets = None if targets is None else np.zeros(targets.shape, dtype=np.float32)
        self._alt = TopkOutput(
            np.zeros((length - 1, alt), dtype=np.int32),
            np.zeros((length - 1, alt), dtype=np.float32),
        )
        self._random = token_choice.stream(spec.seed, _PROMPT_STREAM)

    def add(self, position: int, logits: Array, *, scored: bool) -> None:
        """Add the logits that predict the token at a position."""
        spec, logprobs = self._spec, token_choice.log_softmax(logits)
        if scored:
            self._logprobs[position] = logprobs[spec.tokens[position]]
            if spec.topk_prompt_logprobs:
                top = token_choice.top_tokens(logprobs, spec.topk_prompt_logprobs)
                self._top.token_ids[position], self._top.logprobs[position] = top
        if self._targets is not None and spec.target_prompt_logprobs is not None:
            ids = spec.target_prompt_logprobs[position - 1]
            self._targets[position - 1] = np.where(ids >= 0, logprobs[ids], 0.0)
        for column in range(spec.prompt_alt_tokens_k):
            token = token_choice.choose(logits, spec, self._random)
            self._alt.token_ids[position - 1, column] = token
            self._alt.logprobs[position - 1, column] = logprobs[token]

    def fields(self) -> dict[str, Any]:
        """Return the requested fields of a SampleOutput."""
        spec = self._spec
        fields: dict[str, Any] = {}
        if spec.prompt_logprobs:
            fields["prompt_logprobs"] = self._logprobs
        if spec.topk_prompt_logprobs:
            fields["topk_prompt"] = self._top
        if self._targets is not None:
            fields["target_prompt_logprobs"] = self._targets
            fields["target_layout"] = spec.target_layout
        if spec.prompt_alt_tokens_k:
            fields["prompt_alt"] = self._alt
        return fields
