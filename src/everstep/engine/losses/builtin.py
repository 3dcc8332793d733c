"""Built-in losses: functions of the targets' logprobs, summed over tokens and never normalised.

`specs` declares them. Formulas: the Tinker protocol's documentation of its losses. ``logp`` are the
model's logprobs of the targets, ``q`` those of the policy that sampled them, A the advantages,
r = exp(logp - q).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Inputs = Mapping[str, torch.Tensor]
Settings = Mapping[str, float]


def cross_entropy(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """-Σ logp · weights, where absent weights count as 1. Shapes [T] or [T, K]."""
    weights = inputs.get("weights")
    return -(logp if weights is None else logp * weights).sum()


def importance_sampling(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """-Σ r · A."""
    advantages = inputs["advantages"]
    log_ratio = logp - inputs["logprobs"]
    return -(torch.exp(_zero_where_not(advantages != 0, log_ratio)) * advantages).sum()


def ppo(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """-Σ min(r · A, clamp(r) · A)."""
    return _clipped_surrogate(logp - inputs["logprobs"], inputs["advantages"], settings)


def cispo(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """-Σ stopgrad(clamp(r)) · logp · A."""
    weight = _clamp(torch.exp(logp.detach() - inputs["logprobs"]), settings)
    return -(weight * logp * inputs["advantages"]).sum()


def dro(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """-Σ [logp · A - ½ β (logp - q)²]."""
    penalty = 0.5 * settings["beta"] * (logp - inputs["logprobs"]) ** 2
    return -(logp * inputs["advantages"] - penalty).sum()


def gspo(logp: torch.Tensor, inputs: Inputs, settings: Settings) -> torch.Tensor:
    """-Σ min(r_t · A, clamp(r_t) · A), with r_t = s · exp(logp - stopgrad(logp)).

    s is exp of the mean of logp - q over the datum's tokens where ``sequence_ratio_mask`` is not 0,
    whatever its value there. It is 1 where the mask selects nothing. A datum is one sequence and is
    never cut. This is GSPO-token (arXiv 2507.18071, equation 13) as the Tinker documentation of the
    loss has it (tinker-docs.thinkingmachines.ai/tinker/losses/gspo). The hosted service's default
    thresholds could not be read: `specs` uses ppo's. The paper trains with 1 - 3e-4 and 1 + 4e-4.
    """
    selected = inputs["sequence_ratio_mask"] != 0
    log_ratios = torch.where(selected, logp.detach() - inputs["logprobs"], 0.0)
    mean = log_ratios.sum() / selected.sum().clamp(min=1)
    return _clipped_surrogate(mean + (logp - logp.detach()), inputs["advantages"], settings)


def _clamp(ratio: torch.Tensor, settings: Settings) -> torch.Tensor:
    return ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])


def _clipped_surrogate(
    log_ratio: torch.Tensor, advantages: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """-Σ min(r · A, clamp(r) · A), without computing infinity times zero.

    Where the clipped term is smaller, the gradient is zero. Where A is 0, the term is 0. In both
    cases r may overflow, and neither the loss nor a gradient may become NaN because of it.
    """
    ratio = torch.exp(log_ratio.detach())
    clamped = _clamp(ratio, settings) * advantages
    unclipped = (advantages != 0) & ~(clamped < ratio * advantages)
    moving = torch.exp(_zero_where_not(unclipped, log_ratio)) * advantages
    return -torch.where(unclipped, moving, clamped).sum()


def _zero_where_not(condition: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, values, torch.zeros_like(values))
