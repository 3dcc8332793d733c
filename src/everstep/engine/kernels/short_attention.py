"""Attention of short texts: plain products on the CPU, with a backward of its own.

torch's fused attention never holds the scores of all pairs. For short texts they are few, and its
backward costs four times that of the products, most of all in bfloat16. Here the weights of a pass
are kept, and the scores are computed in float32, as there.
"""

from __future__ import annotations

from typing import Any

import torch

MAX_LENGTHS = {torch.bfloat16: 256, torch.float32: 64}
"""The longest texts, by dtype, for which this is faster than torch's attention."""


class ShortAttention(torch.autograd.Function):
    """Causal attention of texts of one length to themselves.

    Inputs: queries [B, heads, T, width], keys and values [B, key heads, T, width], and the factor
    of the scores. Output: [B, heads, T, value width].
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Compute the weighted values. Heads that share keys are one product."""
        count, heads, length, _ = query.shape
        groups = count * key.shape[1]
        q, k, v = (each.reshape(groups, -1, each.shape[-1]) for each in (query, key, value))
        visible = torch.full((length, length), float("-inf"), device=q.device).triu_(1)
        scores = torch.bmm(q.float() * scale, k.float().transpose(1, 2))
        scores = scores.view(groups, -1, length, length).add_(visible)
        weights = torch.softmax(scores, -1).to(v.dtype).view(groups, -1, length)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return torch.bmm(weights, v).view(count, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Compute the gradients of queries, keys and values."""
        q, k, v, weights = ctx.saved_tensors
        g = gradients[0].reshape(len(q), -1, v.shape[-1])
        of_v = torch.bmm(weights.transpose(1, 2), g)
        of_weights = torch.bmm(g, v.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_scores.mul_(ctx.scale)
        of_q = torch.bmm(of_scores, k)
        of_k = torch.bmm(of_scores.transpose(1, 2), q)
        found = zip((of_q, of_k, of_v), ctx.shapes, strict=True)
        return (*(each.view(shape) for each, shape in found), None)
