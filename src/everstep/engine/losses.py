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
    return -(_ratio(logp, inputs) * inputs["advantages"]).sum()


def ppo(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ min(r · A, clamp(r) · A)."""
    return _clipped(_ratio(logp, inputs), inputs["advantages"], config)


def cispo(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ stopgrad(clamp(r)) · logp · A."""
    weight = _clamp(_ratio(logp, inputs), config).detach()
    return -(weight * logp * inputs["advantages"]).sum()


def dro(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ [logp · A - ½ β (logp - q)²]."""
    penalty = 0.5 * config["beta"] * (logp - inputs["logprobs"]) ** 2
    return -(logp * inputs["advantages"] - penalty).sum()


def gspo(logp: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-Σ min(r_t · A, clamp(r_t) · A); r_t = s · exp(logp - stopgrad(logp)).

    s is exp of the mean of logp - q over the tokens that ``sequence_ratio_mask`` selects; 1 where
    it selects none.
    """
    mask = inputs["sequence_ratio_mask"]
    selected = torch.where(mask.sum() > 0, mask.sum(), 1.0)
    mean = ((logp - inputs["logprobs"]) * mask).sum() / selected
    ratio = torch.exp(mean).detach() * torch.exp(logp - logp.detach())
    return _clipped(ratio, inputs["advantages"], config)


def _ratio(logp: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    return torch.exp(logp - inputs["logprobs"])


def _clamp(ratio: torch.Tensor, config: Config) -> torch.Tensor:
    return ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, config: Config) -> torch.Tensor:
    return -torch.minimum(ratio * advantages, _clamp(ratio, config) * advantages).sum()


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}
