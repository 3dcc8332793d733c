"""Losses of one's own: evaluated here, sent as weights of a cross-entropy.

The gradient of a loss C by the weights is that of -Σ w · logp with w = -dC/dlogp, so the service
needs to know only w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from everstep.wire import types

CustomLoss = Callable[[Sequence[types.Datum], list[Any]], tuple[Any, dict[str, float]]]


def custom_loss(
    data: Sequence[types.Datum], forward: types.ForwardBackwardOutput, loss_fn: CustomLoss
) -> tuple[list[types.Datum], dict[str, float]]:
    """Evaluate a loss on logprobs.

    Args:
        data: the examples.
        forward: their logprobs.
        loss_fn: the loss.

    Returns:
        The examples with the weights that have the loss's gradient, and the loss's metrics.

    Raises:
        ValueError: the loss is not a scalar that depends on the logprobs.
    """
    import torch

    logprobs = [
        output["logprobs"].to_torch().clone().requires_grad_() for output in forward.loss_fn_outputs
    ]
    loss, metrics = loss_fn(data, logprobs)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError("the loss has to be a scalar tensor computed from the logprobs")
    gradients = torch.autograd.grad(loss, logprobs, allow_unused=True)
    weighted = []
    for datum, logprob, gradient in zip(data, logprobs, gradients, strict=True):
        weights = torch.zeros_like(logprob) if gradient is None else -gradient
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "weights": types.TensorData.from_torch(weights),
        }
        weighted.append(types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    return weighted, metrics
