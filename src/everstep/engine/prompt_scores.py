"""What a request wants to know of its prompt: logprobs, likeliest tokens, targets, draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from everstep.engine import choice
from everstep.engine.model import Model
from everstep.engine.sample_spec import SampleSpec
from everstep.wire.outputs import NO_TOPK
from everstep.wire.proto import TopkOutput

Array = np.ndarray[Any, Any]
_DRAWS = 2**63
"""Stream index of the draws at prompt positions, apart from those of the samples."""


def first_scored(spec: SampleSpec) -> int:
    """The first position of a prompt that is scored, 1 or greater; its length: none is."""
    length = len(spec.tokens)
    first = length
    if spec.prompt_logprobs or spec.topk_prompt_logprobs:
        first = _first_logprob(spec)
    if spec.target_prompt_logprobs is not None:
        named = np.flatnonzero((spec.target_prompt_logprobs >= 0).any(axis=1))
        first = min(first, int(named[0]) + 1) if len(named) else first
    return 1 if spec.prompt_alt_tokens_k else first


def _first_logprob(spec: SampleSpec) -> int:
    last_n = spec.prompt_logprobs_last_n
    return max(1, len(spec.tokens) - last_n) if last_n else 1


def prompt_scores(
    model: Model, hidden: torch.Tensor, spec: SampleSpec, begin: int = 0
) -> dict[str, Any]:
    """Score a prompt.

    Args:
        model: computes logits.
        hidden: the prompt's last hidden states from position ``begin`` on, [P - begin, H].
        spec: what is asked.
        begin: where the states begin; before the first position that is scored.

    Returns:
        The fields of a SampleOutput that concern the prompt.
    """
    length = len(spec.tokens)
    asked = (
        spec.prompt_logprobs
        or spec.topk_prompt_logprobs
        or spec.target_prompt_logprobs is not None
        or spec.prompt_alt_tokens_k
    )
    if not asked:
        return {}
    first = _first_logprob(spec)
    scores = _Scores(spec, length)
    for position in range(first_scored(spec), length):
        before = position - 1 - begin
        logits = model.logits(hidden[before : before + 1])[0].cpu().numpy()
        scores.take(position, logits, scored=position >= first)
    return scores.fields()


class _Scores:
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
        self._random = choice.stream(spec.seed, _DRAWS)

    def take(self, position: int, logits: Array, *, scored: bool) -> None:
        """Take the logits that predict the token at a position."""
        spec, logprobs = self._spec, choice.log_softmax(logits)
        if scored:
            self._logprobs[position] = logprobs[spec.tokens[position]]
            if spec.topk_prompt_logprobs:
                ids, values = choice.likeliest(logprobs, spec.topk_prompt_logprobs)
                self._top.token_ids[position], self._top.logprobs[position] = ids, values
        if self._targets is not None and spec.target_prompt_logprobs is not None:
            wanted = spec.target_prompt_logprobs[position - 1]
            self._targets[position - 1] = np.where(wanted >= 0, logprobs[wanted], 0.0)
        for column in range(spec.prompt_alt_tokens_k):
            token = choice.choose(logits, spec, self._random)
            self._alt.token_ids[position - 1, column] = token
            self._alt.logprobs[position - 1, column] = logprobs[token]

    def fields(self) -> dict[str, Any]:
        """What was asked for."""
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
