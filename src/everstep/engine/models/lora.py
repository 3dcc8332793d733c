"""LoRA: wrapped projections of one model that many adapters share.

Every projection that can be adapted is wrapped once. Adapters, and the rows that they apply to, are
bound for the duration of a pass. With none bound, the wrapped model computes the same bits as
before. The low-rank product is computed in the adapter's float32, whatever the base's dtype, unless
the run's `Numerics` say otherwise.

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

from everstep.engine.alignment import aligned
from everstep.engine.kernels.low_rank import AdaptedProduct
from everstep.engine.kernels.low_rank_base import AdaptedBaseProduct
from everstep.engine.models.attention import is_decoding
from everstep.engine.models.frozen_product import product_of

LoraWeights = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""A [rank, in] and B [out, rank] by module."""


@dataclass(frozen=True)
class BoundAdapter:
    """An adapter bound to rows of a batch.

    Attributes:
        weights: its A and B.
        scale: factor of the low-rank product.
        rows: the rows. None: all of them.
        in_base_dtype: whether its products are computed in the base's dtype.
    """

    weights: LoraWeights
    scale: float
    rows: slice | None = None
    in_base_dtype: bool = False


@dataclass
class AdapterBinding:
    """The adapters bound at present. All wrapped projections of a model share it."""

    adapters: Sequence[BoundAdapter] = field(default_factory=tuple)
    _widened: tuple[torch.Tensor, int, torch.Tensor] | None = None

    @contextmanager
    def bind(self, *adapters: BoundAdapter) -> Iterator[None]:
        """Bind adapters for the duration of a pass."""
        previous, self.adapters = self.adapters, adapters
        try:
            yield
        finally:
            self.adapters, self._widened = previous, None

    def widen(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return an input in an adapter's dtype, detached.

        The last one is kept: a layer's projections of queries, keys and values share their input.
        """
        if x.dtype == dtype:
            return x.detach()
        last = self._widened
        if last is None or last[0] is not x or last[1] != x._version or last[2].dtype != dtype:
            last = self._widened = (x, x._version, x.detach().to(dtype))
        return last[2]


class LoraProjection(nn.Module):
    """A projection of the base model, plus the low-rank products of the bound adapters.

    Args:
        base: a frozen ``nn.Linear``, or GPT-2's ``Conv1D``.
        name: name of the projection in the model and in adapters.
        binding: the model's bound adapters.

    Attributes:
        product: the base's product while decoding. None: the base itself.
    """

    def __init__(self, base: nn.Module, name: str, binding: AdapterBinding) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._binding = binding
        self.product = product_of(base)
        self._is_plain = type(base) in (nn.Linear, Conv1D)

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
        """Weight of the base projection, which some models read."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the base's output plus the bound adapters' products."""
        adapters = self._binding.adapters
        whole = len(adapters) == 1 and adapters[0].rows is None
        if whole and self._is_plain and not is_decoding():
            return self._adapted(x, adapters[0])
        y = self._multiply(x)
        for bound in self._binding.adapters:
            pair = bound.weights.get(self.name)
            if pair is None:
                continue
            part = x if bound.rows is None else aligned(x[bound.rows])
            a, b = (each.to(x.dtype) for each in pair) if bound.in_base_dtype else pair
            delta = nn.functional.linear(nn.functional.linear(part.to(a.dtype), a), b)
            delta = (delta * bound.scale).to(y.dtype)
            if bound.rows is None:
                y = y + delta
            else:
                y[bound.rows] += delta
        return y

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the base's output: while decoding, by a product that keeps each row's bits."""
        if self.product is not None and is_decoding() and x.dtype == self.product.weight.dtype:
            return self.product(x)
        y: torch.Tensor = self.base(x)
        return y

    def _adapted(self, x: torch.Tensor, bound: BoundAdapter) -> torch.Tensor:
        """Compute a plain projection with one adapter for all rows, as one operation."""
        pair = bound.weights.get(self.name)
        if pair is None:
            y: torch.Tensor = self.base(x)
            return y
        weight = self.weight.t() if isinstance(self.base, Conv1D) else self.weight
        bias: torch.Tensor | None = self.base.bias  # type: ignore[assignment]
        rows = x.reshape(-1, x.shape[-1])
        product: torch.Tensor
        if bound.in_base_dtype:
            product = AdaptedBaseProduct.apply(  # type: ignore[no-untyped-call]
                rows, None, weight, bias, *pair, bound.scale
            )
        else:
            wide = self._binding.widen(x, pair[0].dtype).reshape(-1, x.shape[-1])
            product = AdaptedProduct.apply(  # type: ignore[no-untyped-call]
                rows, wide, weight, bias, *pair, bound.scale
            )
        return product.view(*x.shape[:-1], product.shape[-1])


def features(projection: nn.Module) -> tuple[int, int]:
    """Return the widths of a projection's input and output."""
    if isinstance(projection, LoraProjection):
        return features(projection.base)
    shape: torch.Size = projection.weight.shape  # type: ignore[assignment]
    return (shape[0], shape[1]) if isinstance(projection, Conv1D) else (shape[1], shape[0])
