"""Training pass: micro-batches of packed datums, logprobs, loss and gradients.

A pass is split into micro-batches by its own datums alone, so other runs cannot change its bits.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from everstep.engine.alignment import tensor_from
from everstep.engine.divergence import diverged, is_finite
from everstep.engine.errors import InputError
from everstep.engine.kernels.packing import Packing
from everstep.engine.losses.objective import (
    Objective,
    Term,
    build_objective,
    combine_metrics,
)
from everstep.engine.models.attention import packed
from everstep.engine.models.model import Model
from everstep.engine.run_state import RunState
from everstep.wire.codecs.proto import Example

TOKENS_PER_MICRO_BATCH = 2048
MAX_PADDING = 1.25
"""Largest ratio of the lengths of datums that are padded to one length for their attention."""


@dataclass(frozen=True)
class PassResult:
    """Result of a pass.

    Attributes:
        outputs: ``logprobs`` of each datum, float32 in the shape of its target_tokens.
        metrics: ``loss:sum``, and the loss's own metrics.
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
    """Run forward (and backward), accumulating gradients into the run's state.

    Yields between micro-batches, and between the datums of a custom loss. The state changes only
    after the last micro-batch, so a pass that fails leaves nothing behind.

    Args:
        model: the run's base model.
        state: the run's state.
        examples: the datums. `validation.check_pass` has accepted them.
        loss_fn: name of the loss.
        config: settings of the loss. Absent ones have their defaults.
        backward: whether to compute gradients.

    Raises:
        Diverged: the adapter has diverged.
        InputError: the loss or a gradient is not finite, or a custom loss can't be computed.
    """
    evaluate = build_objective(loss_fn, config)
    outputs: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in examples]
    terms: dict[int, Term] = {}
    gradients = torch.zeros_like(state.arena.buffers["grads"]) if backward else None
    for batch in micro_batches([len(example.tokens) for example in examples]):
        members = [examples[index] for index in batch]
        batch_terms, logprobs = yield from _micro_batch(model, state, members, evaluate, gradients)
        for index, term, array in zip(batch, batch_terms, logprobs, strict=True):
            terms[index] = term
            outputs[index] = {"logprobs": array}
        yield
    ordered = [terms[index] for index in range(len(examples))]
    total = sum(term.value for term in ordered)
    if not np.isfinite(total):
        raise InputError(_infinite_loss([term.value for term in ordered], total))
    if gradients is not None:
        gradients.add_(state.arena.buffers["grads"])
        if not is_finite(gradients):
            guilty = yield from _first_nonfinite(model, state, examples, evaluate)
            raise InputError(_nonfinite_gradients(guilty))
        state.arena.replace({"grads": gradients})
        state.has_gradients = True
    metrics = combine_metrics([term.metrics for term in ordered])
    return PassResult(outputs, {"loss:sum": total, **metrics})


def _micro_batch(
    model: Model,
    state: RunState,
    examples: Sequence[Example],
    evaluate: Objective,
    gradients: torch.Tensor | None,
) -> Generator[None, None, tuple[list[Term], list[np.ndarray[Any, Any]]]]:
    """Run forward and, where there are gradients to add to, backward.

    Returns:
        The datums' terms, and their logprobs.
    """
    leaves = state.leaves()
    with torch.set_grad_enabled(gradients is not None), model.bind_weights(state.layout, leaves):
        logps = _logprobs(model, examples)
    logprobs = [logp.detach().float().cpu().numpy() for logp in logps]
    if any(np.isnan(array).any() for array in logprobs):  # as the model computes them: no input is
        raise diverged(state.arena.views("params"), "the model's logprobs with it are NaN")
    terms = yield from evaluate(examples, logps)
    if gradients is not None:
        loss = torch.stack([term.surrogate for term in terms]).sum()
        with model.bind_weights(state.layout, leaves):  # checkpointed pieces are computed again
            _add_gradients(gradients, loss, leaves)
    return [Term(term.value, term.surrogate.detach(), term.metrics) for term in terms], logprobs


def _infinite_loss(values: Sequence[float], total: float) -> str:
    """Say which datum's loss is not finite."""
    wrong = [index for index, value in enumerate(values) if not np.isfinite(value)]
    where = f" in datum {wrong[0]}" if wrong else ""
    value = values[wrong[0]] if wrong else total
    return (
        f"The loss is {value}{where}: logprobs or advantages are too large. No gradient was kept."
    )


def _first_nonfinite(
    model: Model, state: RunState, examples: Sequence[Example], evaluate: Objective
) -> Generator[None, None, int | None]:
    """Find the first datum whose gradients are not finite. None: only those of all together."""
    for index, example in enumerate(examples):
        gradients = torch.zeros_like(state.arena.buffers["grads"])
        yield from _micro_batch(model, state, [example], evaluate, gradients)
        if not is_finite(gradients):
            return index
        yield
    return None


def _nonfinite_gradients(index: int | None) -> str:
    if index is None:
        return (
            "The sum of the gradients is not finite, of this pass and of those that are pending: "
            "they are too large. No gradient of this pass was kept."
        )
    return (
        f"Some gradients of datum {index} are not finite: its logprobs or advantages are too "
        "large, or too far from the model's. No gradient of this pass was kept."
    )


def micro_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group datums of similar lengths, with a bound on the tokens of a group.

    Args:
        lengths: lengths of the datums in tokens.

    Returns:
        Indices of each group's datums, longest datums first.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        tokens += lengths[index]
        if not groups or tokens > TOKENS_PER_MICRO_BATCH:
            groups.append([])
            tokens = lengths[index]
        groups[-1].append(index)
    return groups


def _logprobs(model: Model, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Compute the logprobs of each datum's targets, in the targets' shape.

    They are packed into one row: what is computed for each token alone needs no padding.
    """
    lengths = [len(example.tokens) for example in examples]
    tokens = np.concatenate([example.tokens for example in examples])[np.newaxis]
    packing = Packing(lengths, MAX_PADDING, model.device)
    with packed(packing):
        hidden = model.hidden(tensor_from(tokens).to(model.device), position_ids=packing.positions)[
            0
        ]
    targets = [tensor_from(example.inputs["target_tokens"]) for example in examples]
    columns = max(target[0].numel() for target in targets)
    grid = torch.cat([_pad_columns(target, columns) for target in targets]).to(model.device)
    rows = torch.split(model.target_logprobs(hidden, grid), lengths)
    return [
        row[:, : target[0].numel()].reshape(target.shape)
        for row, target in zip(rows, targets, strict=True)
    ]


def _pad_columns(target: torch.Tensor, columns: int) -> torch.Tensor:
    """Return a datum's targets as [T, columns]. Added columns are token 0 and unused."""
    grid = target.reshape(len(target), -1)
    return torch.nn.functional.pad(grid, (0, columns - grid.shape[1]))


def _add_gradients(
    gradients: torch.Tensor, loss: torch.Tensor, leaves: Mapping[str, torch.Tensor]
) -> None:
    """Differentiate a loss and add its gradients, in the arena's layout."""
    computed = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    offset = 0
    for leaf, gradient in zip(leaves.values(), computed, strict=True):
        if gradient is not None:
            gradients[offset : offset + leaf.numel()].add_(gradient.reshape(-1))
        offset += leaf.numel()
