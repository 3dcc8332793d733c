"""Adapted products of one input: projections of queries, keys and values, or of a gate and its MLP.

Each is y = W x + b + s B A x with a frozen W. As one operation, they convert their input and the
gradient of it once, and their A's are one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from everstep.engine.kernels.products import add_linear, linear


@dataclass(frozen=True)
class Projection:
    """A frozen projection: W [out, in], and b [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class AdaptedProducts(torch.autograd.Function):
    """The products of rows with frozen projections and their adapters.

    Inputs: x [N, in] in the base's dtype, the scale, the projections, the indices of those that
    are adapted, and their A [rank, in] and B [out, rank]: all A's, then all B's. Outputs: [N, out]
    of each projection in the base's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: float,
        projections: tuple[Projection, ...],
        adapted: tuple[int, ...],
        *pairs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the products. They are recorded by what `backward` needs."""
        outputs = [linear(x, each.weight, each.bias) for each in projections]
        count = len(adapted)
        a, b = _stacked(pairs[:count]), pairs[count:]
        low = linear(x.to(a.dtype), a).mul_(scale)
        for index, part, up in zip(adapted, _columns(low, count), b, strict=True):
            outputs[index] = _add_low(outputs[index], part, up)
        ctx.save_for_backward(x, low, a, *b)
        ctx.scale, ctx.projections, ctx.adapted = scale, projections, adapted
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Compute the gradients of x and of the adapters."""
        x, low, a, *b = ctx.saved_tensors
        of_b, lows = [], []
        for index, part, up in zip(ctx.adapted, _columns(low, len(b)), b, strict=True):
            wide = gradients[index].to(up.dtype)
            of_b.append(linear(part.t(), wide.t()).t())  # faster than its transpose
            lows.append(linear(wide, up.t()))
        low_g = (lows[0] if len(lows) == 1 else torch.cat(lows, 1)).mul_(ctx.scale)
        of_a = torch.split(linear(low_g.t(), x.to(a.dtype).t()), len(a) // len(b))
        of_x = None
        if ctx.needs_input_grad[0]:
            for each, g in zip(ctx.projections, gradients, strict=True):
                down = each.weight.t()
                of_x = linear(g, down) if of_x is None else add_linear(of_x, g, down)
            of_x = _add_low(of_x, low_g, a.t())
        return of_x, None, None, None, *of_a, *of_b


def _stacked(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return tensors[0].detach() if len(tensors) == 1 else torch.cat(tensors)


def _columns(low: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Return each projection's part of the stacked A x, contiguous."""
    if count == 1:
        return (low,)
    return tuple(part.contiguous() for part in torch.split(low, low.shape[1] // count, 1))


def _add_low(y: torch.Tensor | None, low: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Add a low-rank product, in the adapter's dtype, to y. May overwrite y."""
    assert y is not None
    if y.dtype == low.dtype:
        return add_linear(y, low, up)
    return y.add_(linear(low, up).to(y.dtype))
