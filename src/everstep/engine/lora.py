"""LoRA on a model that many adapters share.

Every projection that may be adapted is wrapped once. Which adapter applies, and to which rows, is
bound for the time of a pass; with none bound, the wrapped model computes what it did before, bit
for bit. The low-rank product is computed in the adapter's float32, whatever the base's dtype.

The formula and the initialisation are those of LoRA (Hu et al. 2021) as PEFT has them:
y = W x + (alpha / rank) B A x, A uniform as kaiming_uniform with a = sqrt(5), B zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Weights = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By module: A [rank, in] and B [out, rank]."""


@dataclass(frozen=True)
class Bound:
    """An adapter that applies to some rows of a batch; ``rows`` None: to all."""

    weights: Weights
    scale: float
    rows: slice | None = None


@dataclass
class Binding:
    """What is bound now; shared by all wrapped projections of a model."""

    adapters: Sequence[Bound] = field(default_factory=tuple)

    @contextmanager
    def to(self, *adapters: Bound) -> Iterator[None]:
        """Bind adapters for the time of a pass."""
        before, self.adapters = self.adapters, adapters
        try:
            yield
        finally:
            self.adapters = before


class LoraProjection(nn.Module):
    """A projection of the base model and the low-rank products of what is bound.

    Args:
        base: an ``nn.Linear`` or GPT-2's ``Conv1D``; frozen.
        name: its name in the model, by which adapters know it.
        binding: what is bound.
    """

    def __init__(self, base: nn.Module, name: str, binding: Binding) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._binding = binding

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return features(self.base)[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return features(self.base)[1]

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight; some models look at it."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base's output plus what is bound."""
        y: torch.Tensor = self.base(x)
        for bound in self._binding.adapters:
            pair = bound.weights.get(self.name)
            if pair is None:
                continue
            part = x if bound.rows is None else x[bound.rows]
            delta = nn.functional.linear(
                nn.functional.linear(part.to(pair[0].dtype), pair[0]), pair[1]
            )
            delta = (delta * bound.scale).to(y.dtype)
            if bound.rows is None:
                y = y + delta
            else:
                y[bound.rows] += delta
        return y


def features(projection: nn.Module) -> tuple[int, int]:
    """Width of a projection's input and output."""
    if isinstance(projection, LoraProjection):
        return features(projection.base)
    shape: torch.Size = projection.weight.shape  # type: ignore[assignment]
    return (shape[0], shape[1]) if isinstance(projection, Conv1D) else (shape[1], shape[0])
