"""Tapered off-policy REINFORCE (TOPR, arXiv 2503.14286): Everstep's ``stable_reinforce``.

The hosted service does not publish how it defines ``stable_reinforce``. This is a stand-in with a
published definition, the paper's TOPR update with a setting for its upper limit, which is 1 there:

    ∇J = Σ over τ with R(τ) ≥ 0 of R(τ) ∇log π(τ)
       + Σ over τ with R(τ) < 0 of min(π(τ) / μ(τ), alpha) R(τ) ∇log π(τ)

τ is a sampled sequence, as far as the datum has its tokens. π(τ) / μ(τ) is exp of the sum of
logp - q over these tokens, where q are the logprobs that were recorded at sampling. R(τ) is the
advantage. Where the tokens of a sequence have different advantages, the sign of each token's own
one decides whether its term is tapered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from everstep.engine.losses.specs import (
    SAMPLED_SEQUENCES,
    SAMPLING_LOGPROBS,
    SEQUENCE_NUMBERS,
)

Inputs = Mapping[str, torch.Tensor]
Settings = Mapping[str, float]


def topr(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """-Σ stopgrad(c) · logp · A + ½ kl_coeff Σ (logp - q)².

    c is 1 where A > 0, and the sequence's ratio, at most ``alpha``, where A < 0. The second sum is
    over all sampled tokens. It estimates the divergence from the policy that sampled.
    """
    advantages, sequences = inputs["advantages"], inputs[SAMPLED_SEQUENCES]
    gaps = _gaps(logp, inputs)
    weights = torch.ones_like(logp)
    for number, limited in enumerate(_limited_ratios(gaps, inputs, settings)):
        tapered = (sequences == number) & (advantages < 0)
        weights = torch.where(tapered, limited.to(weights.dtype), weights)
    moving = torch.where(advantages != 0, logp, torch.zeros_like(logp))
    loss = -(weights * moving * advantages).sum()
    if settings["kl_coeff"]:
        loss = loss + 0.5 * settings["kl_coeff"] * (gaps**2).sum()
    return loss


def topr_metrics(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> dict[str, torch.Tensor]:
    """Mark the definition, count the sequences with a negative advantage and sum their weights."""
    limited = _limited_ratios(_gaps(logp, inputs), inputs, settings)
    falling = inputs["advantages"] < 0
    sequences = inputs[SAMPLED_SEQUENCES]
    negative = [
        ((sequences == number) & falling).any() for number in range(len(inputs[SEQUENCE_NUMBERS]))
    ]
    counted = torch.stack(negative) if negative else falling[:0]
    return {
        "stable_reinforce/everstep_topr:max": limited.new_ones(1),
        "stable_reinforce/negative_sequences:sum": counted.double(),
        "stable_reinforce/negative_weight:sum": torch.where(counted, limited, 0.0),
    }


def _gaps(logp: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Return logp - q of the sampled tokens, and 0 for the others."""
    sampled = inputs[SAMPLED_SEQUENCES] >= 0
    return torch.where(sampled, logp - inputs[SAMPLING_LOGPROBS], torch.zeros_like(logp))


def _limited_ratios(gaps: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """Return min(π / μ, alpha) of each sequence, float64 [S]. An overflowing ratio is limited."""
    exact, sequences = gaps.detach().double(), inputs[SAMPLED_SEQUENCES]
    count = len(inputs[SEQUENCE_NUMBERS])
    sums = [torch.where(sequences == number, exact, 0.0).sum() for number in range(count)]
    alpha = settings["alpha"]
    limit = math.log(alpha) if alpha > 0 else -math.inf
    return torch.exp(torch.stack(sums).clamp(max=limit)) if sums else exact[:0]
