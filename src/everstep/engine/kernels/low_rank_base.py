"""Adapted product in the base's dtype: y = W x + b + s B A x, for bases in half precision.

The adapter's weights are rounded to the base's dtype for each product, and sums are in float32, as
tensor cores have them. Gradients of the weights are products of rounded numbers in float32. The
weights themselves, their gradients and moments stay float32.
"""

from __future__ import annotations

from typing import Any

import torch

from everstep.engine.kernels.low_rank import Gradients
from everstep.engine.kernels.products import linear


class AdaptedBaseProduct(torch.autograd.Function):
    """The product of rows with a frozen weight and an adapter.

    Inputs and output are those of `low_rank.AdaptedProduct`; the input in the adapter's dtype is
    not used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        wide: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute the product. It is recorded by what `backward` needs."""
        y = linear(x, weight, bias)
        low = linear(x, a.to(x.dtype)).mul_(scale)
        y.add_(linear(low, b.to(x.dtype)))
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        """Compute the gradients of x, A and B."""
        x, weight, a, b, low = ctx.saved_tensors
        g = gradients[0]
        of_b = _in_float32(g.t(), low)
        low_g = linear(g, b.to(g.dtype).t()).mul_(ctx.scale)
        of_a = _in_float32(low_g.t(), x)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = linear(g, weight.t())
            of_x.add_(linear(low_g, a.to(g.dtype).t()))
        return of_x, None, None, None, of_a, of_b, None


def _in_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply matrices of half precision. The result was never rounded to it."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
