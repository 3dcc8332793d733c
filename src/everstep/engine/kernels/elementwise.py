"""Norm, rotation and gate of a layer: one operation each, with a backward of its own.

They keep less of a pass than the operations they consist of, and make fewer copies. Values are
those of the modules of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class RmsNorm(torch.autograd.Function):
    """Rows [..., width] divided by their root mean square, computed in float32, times a weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalise. One number a row is kept beside the input."""
        wide = x.float()
        rate = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rate)
        return weight * (wide * rate).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Compute the gradient of the rows. The weight is frozen."""
        x, weight, rate = ctx.saved_tensors
        g = gradients[0].float() * weight
        normed = x.float() * rate
        shared = (g * normed).mean(-1, keepdim=True)
        return g.addcmul_(normed, shared, value=-1).mul_(rate).to(x.dtype), None, None


class Rotate(torch.autograd.Function):
    """Rotation of the halves of heads [N, heads, width] against each other.

    Inputs: the heads, their cosines and their sines with the first half's sign changed, [N, 1,
    width] each.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        """Rotate."""
        ctx.save_for_backward(cosines, sines)
        return (x * cosines).add_(_swap_halves(x).mul_(sines))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Rotate back."""
        cosines, sines = ctx.saved_tensors
        g = gradients[0]
        return (g * cosines).add_(_swap_halves(g * sines)), None, None


class Gate(torch.autograd.Function):
    """SiLU of a gate times what it lets through."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Multiply. The two inputs are kept."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Compute the gradients of both."""
        gate, up = ctx.saved_tensors
        g = gradients[0]
        of_gate = torch.ops.aten.silu_backward(g * up, gate)
        return of_gate, functional.silu(gate).mul_(g)


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), -1)
