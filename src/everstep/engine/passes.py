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
from everstep.engine.model import Model
from everstep.engine.objectives import Term, combined, objective
from everstep.engine.state import RunState
from everstep.wire.proto import Example

TOKENS_PER_MICRO_BATCH = 2048
_MOST_PADDING = 1.25


@dataclass(frozen=True)
class PassResult:
    """What a pass gives.

    Attributes:
        outputs: per datum ``logprobs``, float32 in the shape of its target_tokens.
        metrics: ``loss:sum``, and those of a loss of a user's own.
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

    Yields between micro-batches, and between the datums of a loss of a user's own. The state
    changes only after the last one, so that a pass that fails leaves nothing behind.

    Args:
        model: the run's base model.
        state: the run.
        examples: the datums; `validation.check_pass` has accepted them.
        loss_fn: the loss's name.
        config: its settings; the rest are defaults.
        backward: whether gradients are wanted.
    """
    terms_of = objective(loss_fn, config)
    outputs: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in examples]
    terms: dict[int, Term] = {}
    gradients = torch.zeros_like(state.arena.buffers["grads"]) if backward else None
    for batch in micro_batches([len(example.tokens) for example in examples]):
        leaves = state.leaves()
        chosen = [examples[index] for index in batch]
        with torch.set_grad_enabled(backward), model.bound_weights(state.layout, leaves):
            logps = _logprobs(model, chosen)
        found = yield from terms_of(chosen, logps)
        if gradients is not None:
            loss = torch.stack([term.surrogate for term in found]).sum()
            with model.bound_weights(state.layout, leaves):  # for what is computed again
                _add_gradients(gradients, loss, leaves)
        for index, term, logp in zip(batch, found, logps, strict=True):
            terms[index] = Term(term.value, term.surrogate.detach(), term.metrics)
            outputs[index] = {"logprobs": logp.detach().float().cpu().numpy()}
        yield
    ordered = [terms[index] for index in range(len(examples))]
    total = sum(term.value for term in ordered)
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
    metrics = combined([term.metrics for term in ordered])
    return PassResult(outputs, {"loss:sum": total, **metrics})


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
