"""The losses, as functions of the target's logprobs. Summed over tokens, never normalised.

Formulas: the Tinker protocol's documentation of its losses. ``logp`` are the model's logprobs of
the targets, ``q`` those of the policy that sampled them, A the advantages, r = exp(logp - q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Inputs = Mapping[str, torch.Tensor]
Config = Mapping[str, float]
Loss = Callable[[torch.Tensor, Inputs, Config], torch.Tensor]


def cross_entropy(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ logp · weights; weights 1 where none are given. Shapes [T] or [T, K]."""
    weights = inputs.get("weights")
    return -(logp if weights is None else logp * weights).sum()


def importance_sampling(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ r · A."""
    advantages = inputs["advantages"]
    log_ratio = logp - inputs["logprobs"]
    return -(torch.exp(_where(advantages != 0, log_ratio)) * advantages).sum()


def ppo(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ min(r · A, clamp(r) · A)."""
    return _clipped(logp - inputs["logprobs"], inputs["advantages"], config)


def cispo(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ stopgrad(clamp(r)) · logp · A."""
    weight = _clamp(torch.exp(logp.detach() - inputs["logprobs"]), config)
    return -(weight * logp * inputs["advantages"]).sum()


def dro(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ [logp · A - ½ β (logp - q)²]."""
    penalty = 0.5 * config["beta"] * (logp - inputs["logprobs"]) ** 2
    return -(logp * inputs["advantages"] - penalty).sum()


def gspo(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ min(r_t · A, clamp(r_t) · A); r_t = s · exp(logp - stopgrad(logp)).

    s is exp of the mean of logp - q over the tokens of the datum where ``sequence_ratio_mask`` is
    not 0, whatever its value there; 1 where it selects none. A datum is one sequence, and is never
    cut. This is GSPO-token (arXiv 2507.18071, equation 13) as the Tinker documentation of the loss
    has it (tinker-docs.thinkingmachines.ai/tinker/losses/gspo). What that page says of the default
    thresholds was not to be had: `validation.CONFIG` takes ppo's. The paper trains with 1 - 3e-4
    and 1 + 4e-4.
    """
    selected = inputs["sequence_ratio_mask"] != 0
    log_ratios = torch.where(selected, logp.detach() - inputs["logprobs"], 0.0)
    mean = log_ratios.sum() / selected.sum().clamp(min=1)
    return _clipped(mean + (logp - logp.detach()), inputs["advantages"], config)


def _clamp(ratio: torch.Tensor, config: Config) -> torch.Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


def _clipped(log_ratio: torch.Tensor, advantages: torch.Tensor, config: Config) -> torch.Tensor:
    """-Σ min(r · A, clamp(r) · A), without a product of infinity and zero on the way.

    Where the clipped term is the smaller one nothing moves; where A is 0 there is nothing. There r
    may overflow, and neither the loss nor a gradient may become NaN by that.
    """
    ratio = torch.exp(log_ratio.detach())
    clamped = _clamp(ratio, config) * advantages
    free = (advantages != 0) & ~(clamped < ratio * advantages)
    moving = torch.exp(_where(free, log_ratio)) * advantages
    return -torch.where(free, moving, clamped).sum()


def _where(counts: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """The log ratios that count, 0 elsewhere."""
    return torch.where(counts, log_ratio, torch.zeros_like(log_ratio))


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}
