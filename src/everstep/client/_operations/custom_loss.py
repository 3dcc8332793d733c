"""Custom losses: evaluated in this process, and sent as the weights of a cross-entropy.

The gradient of a loss C with respect to the parameters equals that of -Σ w · logp with
w = -dC/dlogp. So the service only needs w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from everstep.wire import types

CustomLoss = Callable[["Sequence[types.Datum]", list[Any]], tuple[Any, dict[str, float]]]


def forward_data(data: Sequence[types.Datum]) -> list[types.Datum]:
    """Return the data to send for computing the logprobs that a loss gets.

    Only targets and weights are sent. Other inputs are for the loss alone. Absent weights are zero.

    Raises:
        ValueError: a datum has no ``target_tokens``.
    """
    return [_with_weights(datum, datum.loss_fn_inputs.get("weights")) for datum in data]


def custom_loss(
    data: Sequence[types.Datum],
    forward: types.ForwardBackwardOutput,
    loss_fn: CustomLoss,
    given: Sequence[Any] | None = None,
) -> tuple[list[types.Datum], dict[str, float]]:
    """Evaluate a loss on logprobs. It runs the caller's code, so not on the client's event loop.

    Args:
        data: the examples.
        forward: their logprobs.
        loss_fn: the loss.
        given: the examples as the caller gave them, for the loss. None: ``data``.

    Returns:
        The examples with weights that have the loss's gradient, and the loss's metrics with its
        value as ``loss:sum``.

    Raises:
        ValueError: the loss is not a scalar that depends on the logprobs, or the service's
            logprobs don't match the data.
    """
    import torch

    outputs = forward.loss_fn_outputs
    if len(outputs) != len(data) or not all("logprobs" in output for output in outputs):
        raise ValueError(
            f"the service returned {len(outputs)} outputs for {len(data)} datums, or no logprobs"
        )
    logprobs = [output["logprobs"].to_torch().clone().requires_grad_() for output in outputs]
    loss, metrics = loss_fn(data if given is None else given, logprobs)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError("the loss has to be a scalar tensor computed from the logprobs")
    loss.backward()  # type: ignore[no-untyped-call]  # also fills gradients of the caller's own parameters
    if all(logprob.grad is None for logprob in logprobs):
        raise ValueError("the loss doesn't depend on any of the logprobs")
    weighted = [
        _with_weights(datum, types.TensorData.from_torch(_negative_gradient(logprob)))
        for datum, logprob in zip(data, logprobs, strict=True)
    ]
    return weighted, {**metrics, "loss:sum": float(loss.detach())}


def _negative_gradient(logprob: Any) -> Any:
    import torch

    return torch.zeros_like(logprob) if logprob.grad is None else -logprob.grad


def _with_weights(datum: types.Datum, weights: types.TensorData | None) -> types.Datum:
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise ValueError("a custom loss needs target_tokens in every datum")
    if weights is None:
        values = [0.0] * targets.to_numpy().size
        shape = targets.shape or [len(values)]
        weights = types.TensorData(data=values, dtype="float32", shape=shape)
    inputs = {"target_tokens": targets, "weights": weights}
    return datum.model_copy(update={"loss_fn_inputs": inputs})
