"""Training passes: micro-batches of like lengths, logprobs, loss, gradients.

How a pass is cut into micro-batches depends on its own datums alone, so that what else the
service does can't move a bit of it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from everstep.engine.errors import InputError
from everstep.engine.losses import LOSSES
from everstep.engine.model import Model
from everstep.engine.state import RunState
from everstep.engine.validation import CONFIG
from everstep.wire.proto import Example

TOKENS_PER_MICRO_BATCH = 2048
_MOST_PADDING = 1.25


@dataclass(frozen=True)
class PassResult:
    """What a pass gives.

    Attributes:
        outputs: per datum ``logprobs``, float32 in the shape of its target_tokens.
        metrics: ``loss:sum``.
    """

    outputs: list[dict[str, np.ndarray[Any, Any]]]
    metrics: dict[str, float]


def forward_backward(
    model: Model,
    state: RunState,
    examples: Sequence[Example],
    loss_fn: str,
    config: Mapping[str, float | str],
    *,
    backward: bool,
) -> Generator[None, None, PassResult]:
    """Compute a loss and, if asked, add its gradients to those that wait in the state.

    Yields between micro-batches. The state changes only after the last one, so that a pass that
    fails leaves nothing behind.

    Args:
        model: the run's base model.
        state: the run.
        examples: the datums; `validation.check_pass` has accepted them.
        loss_fn: the loss's name.
        config: its settings; the rest are defaults.
        backward: whether gradients are wanted.
    """
    settings = {**CONFIG[loss_fn], **{key: float(value) for key, value in config.items()}}
    outputs: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in examples]
    total = 0.0
    gradients = torch.zeros_like(state.arena.buffers["grads"]) if backward else None
    for batch in micro_batches([len(example.tokens) for example in examples]):
        leaves = state.leaves()
        with torch.set_grad_enabled(backward), model.bound_weights(state.layout, leaves):
            logps = _logprobs(model, [examples[index] for index in batch])
            losses = []
            for index, logp in zip(batch, logps, strict=True):
                inputs = _on(model.device, examples[index].inputs)
                losses.append(LOSSES[loss_fn](logp, inputs, settings))
                outputs[index] = {"logprobs": logp.detach().float().cpu().numpy()}
            loss = torch.stack(losses).sum()
            if gradients is not None:
                _add_gradients(gradients, loss, leaves)
        total += float(torch.stack(losses).detach().double().sum())
        yield
    if not np.isfinite(total):
        raise InputError(
            f"The loss is {total}: logprobs or advantages are too large. No gradient was kept."
        )
    if gradients is not None:
        if not gradients.isfinite().all():
            raise InputError(
                "Some gradients are not finite: logprobs or advantages are too large, or too far "
                "from the model's. No gradient was kept."
            )
        (waiting,) = state.arena.writable("grads")
        waiting.add_(gradients)
        state.has_gradients = True
    return PassResult(outputs, {"loss:sum": total})


def micro_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group datums of like lengths: few tokens a group, little padding.

    Args:
        lengths: of the datums, in tokens.

    Returns:
        Indices of the datums of each group, longest groups first.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    for index in order:
        if groups:
            widest = lengths[groups[-1][0]]
            fits = (len(groups[-1]) + 1) * widest <= TOKENS_PER_MICRO_BATCH
            if fits and widest <= _MOST_PADDING * lengths[index]:
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups


def _logprobs(model: Model, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The targets' logprobs of each datum, in the target's shape.

    Datums are padded on the right: a causal model's earlier positions don't see the padding.
    """
    width = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), width), dtype=np.int64)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
    hidden = model.hidden(torch.from_numpy(tokens).to(model.device))
    lengths = [len(example.tokens) for example in examples]
    flat = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)])
    targets = [torch.from_numpy(example.inputs["target_tokens"].copy()) for example in examples]
    wide = max(target[0].numel() for target in targets)
    grid = torch.cat([_columns(target, wide) for target in targets]).to(model.device)
    rows = torch.split(model.target_logprobs(flat, grid), lengths)
    return [
        row[:, : target[0].numel()].reshape(target.shape)
        for row, target in zip(rows, targets, strict=True)
    ]


def _columns(target: torch.Tensor, wide: int) -> torch.Tensor:
    """A datum's targets as [T, wide]; columns that it doesn't have are token 0, and unused."""
    grid = target.reshape(len(target), -1)
    return torch.nn.functional.pad(grid, (0, wide - grid.shape[1]))


def _on(device: torch.device, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()).to(device) for name, array in inputs.items()}


def _add_gradients(
    gradients: torch.Tensor, loss: torch.Tensor, leaves: Mapping[str, torch.Tensor]
) -> None:
    """Add a loss's gradients, in the arena's layout."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    offset = 0
    for leaf, gradient in zip(leaves.values(), found, strict=True):
        if gradient is not None:
            gradients[offset : offset + leaf.numel()].add_(gradient.reshape(-1))
        offset += leaf.numel()
