"""Adapted product: y = W x + b + s B A x with a frozen W, and its gradients.

As one operation it keeps only the input and A x of a pass. It computes no gradient of frozen
weights and none of an input that needs none, and scales [N, rank] instead of [N, out].
"""

from __future__ import annotations

from typing import Any

import torch

from everstep.engine.kernels.products import linear

Gradients = tuple[torch.Tensor | None, None, None, None, torch.Tensor, torch.Tensor, None]


class AdaptedProduct(torch.autograd.Function):
    """The product of rows with a frozen weight and an adapter.

    Inputs: x [N, in] in the base's dtype, the same in the adapter's, W [out, in], b [out] or
    None, A [rank, in], B [out, rank] and the scale. Output: [N, out] in the base's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        wide: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute the product. It is recorded by what `backward` needs."""
        y = linear(x, weight, bias)
        low = linear(wide, a).mul_(scale)
        y.add_(linear(low, b).to(y.dtype))
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Gradients:
        """Compute the gradients of x, A and B."""
        x, weight, a, b, low = ctx.saved_tensors
        g = gradients[0]
        wide = g.to(b.dtype)
        of_b = linear(low.t(), wide.t()).t()  # faster than its transpose
        low_g = linear(wide, b.t()).mul_(ctx.scale)
        of_a = linear(low_g.t(), x.to(a.dtype).t())
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = linear(g, weight.t())
            of_x.add_(linear(low_g, a.t()).to(of_x.dtype))
        return of_x, None, None, None, of_a, of_b, None
