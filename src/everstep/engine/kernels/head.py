"""Output head in training: logprobs of targets, without all tokens' logits at once.

Logits are computed in pieces. A piece's are dropped when the targets' logprobs are known, and
computed again for the gradient, in whose place they then turn into softmax minus one-hot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from everstep.engine.transfer import is_accelerator

_BLOCK_CELLS = 1 << 19
"""Bound of the temporary copies of logits."""


class TargetLogprobs(torch.autograd.Function):
    """Logprobs of targets, float32 [N, K].

    Inputs: a function of hidden states that computes float32 logits, the rows of a piece, the rows
    that may get a gradient (None: any), hidden states [N, H], target ids [N, K], and the parameters
    of the function that need gradients. Rows whose logprobs have no gradient are not computed
    again, as far as the host knows them without waiting for a device.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        piece: int,
        rows: torch.Tensor | None,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the logprobs. Of the logits, only their logsumexp is kept."""
        logprobs, norms = [], []
        for states, ids in zip(
            torch.split(hidden, piece), torch.split(targets, piece), strict=True
        ):
            logits = logits_of(states)
            norm = _logsumexp(logits)
            logprobs.append(logits.gather(-1, ids) - norm)
            norms.append(norm)
        ctx.save_for_backward(hidden, targets, torch.cat(norms), *parameters)
        ctx.logits_of, ctx.piece, ctx.rows = logits_of, piece, rows
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Compute the gradients of the hidden states and the parameters."""
        hidden, targets, norms, *parameters = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[3] else None
        of_parameters: list[torch.Tensor | None] = [None] * len(parameters)
        wanted = _wanted(gradients[0], ctx.rows)
        for rows in torch.split(wanted, ctx.piece) if len(wanted) else ():
            with torch.enable_grad():
                states = hidden[rows].requires_grad_(of_hidden is not None)
                logits = ctx.logits_of(states)
            of_logits = _of_logits(logits.detach(), targets[rows], norms[rows], gradients[0][rows])
            leaves = parameters if of_hidden is None else [*parameters, states]
            computed = torch.autograd.grad(logits, leaves, of_logits)
            for index, (known, part) in enumerate(zip(of_parameters, computed, strict=False)):
                of_parameters[index] = part if known is None else known.add_(part)
            if of_hidden is not None:
                of_hidden[rows] = computed[-1]
        return (None, None, None, of_hidden, None, *of_parameters)


def _wanted(gradient: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
    """Return the rows to compute again, on an accelerator without waiting for it."""
    if known is not None:
        return known
    if is_accelerator(gradient.device):
        return torch.arange(len(gradient), device=gradient.device)
    return (gradient != 0).any(-1).nonzero()[:, 0]


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Return the logsumexp of each row, [N, 1], in blocks that stay in the processor's caches."""
    blocks = torch.split(logits, max(1, _BLOCK_CELLS // logits.shape[1]))
    return torch.cat([torch.logsumexp(block, -1, keepdim=True) for block in blocks])


def _of_logits(
    logits: torch.Tensor, targets: torch.Tensor, norms: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Turn logits, in place, into the gradient of the targets' logprobs: g (one-hot - softmax)."""
    size = max(1, _BLOCK_CELLS // logits.shape[1])
    factors = -gradient.sum(-1, keepdim=True)
    for block, norm, factor in zip(
        *(torch.split(each, size) for each in (logits, norms, factors)), strict=True
    ):
        block.sub_(norm).exp_().mul_(factor)
    return logits.scatter_add_(-1, targets, gradient)
