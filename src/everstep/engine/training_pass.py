"""Training pass: micro-batches of packed datums, logprobs, loss and gradients.

A pass is split into micro-batches by its own datums alone, so other runs cannot change its bits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from everstep.engine.alignment import tensor_from
from everstep.engine.arena import split
from everstep.engine.divergence import diverged, is_finite
from everstep.engine.errors import InputError
from everstep.engine.kernels.packing import Packing
from everstep.engine.kernels.threads import threads_for
from everstep.engine.losses.objective import (
    Objective,
    Term,
    build_objective,
    combine_metrics,
    silent_input,
)
from everstep.engine.models.model import Model
from everstep.engine.run_state import RunState
from everstep.engine.transfer import QueueBound, download, is_accelerator, upload
from everstep.wire.codecs.proto import Example

MAX_PADDING = 1.25
"""Largest ratio of the lengths of datums that are padded to one length for their attention."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PassResult:
    """Result of a pass.

    Attributes:
        outputs: ``logprobs`` of each datum, float32 in the shape of its target_tokens.
        metrics: ``loss:sum``, and the loss's own metrics.
    """

    outputs: list[dict[str, Array]]
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
    loss = _Loss(build_objective(loss_fn, config), silent_input(loss_fn))
    logprobs: list[torch.Tensor] = [torch.empty(0)] * len(examples)
    terms: dict[int, Term] = {}
    gradients = torch.zeros_like(state.arena.buffers["grads"]) if backward else None
    queue = QueueBound(model.device)
    lengths = [len(example.tokens) for example in examples]
    for batch in micro_batches(lengths, state.numerics.micro_batch_tokens):
        members = [examples[index] for index in batch]
        batch_terms, logps = yield from _micro_batch(model, state, members, loss, gradients)
        for index, term, logp in zip(batch, batch_terms, logps, strict=True):
            terms[index], logprobs[index] = term, logp
        queue.mark()
        yield
    outputs, values, metrics = _results(logprobs, [terms[index] for index in range(len(examples))])
    _check_logprobs(state, outputs)
    total = sum(values)
    if not np.isfinite(total):
        raise InputError(_infinite_loss(values, total))
    if gradients is not None:
        gradients.add_(state.arena.buffers["grads"])
        if not is_finite(gradients):
            guilty = yield from _first_nonfinite(model, state, examples, loss)
            raise InputError(_nonfinite_gradients(guilty))
        state.arena.replace({"grads": gradients})
        state.has_gradients = True
    return PassResult(
        [{"logprobs": array} for array in outputs],
        {"loss:sum": total, **combine_metrics(metrics)},
    )


@dataclass(frozen=True)
class _Loss:
    """A pass's objective, and the input that targets get no gradient from where it is 0."""

    evaluate: Objective
    silent: str | None


def _micro_batch(
    model: Model,
    state: RunState,
    examples: Sequence[Example],
    loss: _Loss,
    gradients: torch.Tensor | None,
) -> Generator[None, None, tuple[list[Term], list[torch.Tensor]]]:
    """Run forward and, where there are gradients to add to, backward.

    Returns:
        The datums' terms, and their logprobs in float32. Both are still on the device.
    """
    leaves = state.leaves()
    bind = partial(model.bind_weights, state.layout, leaves, state.numerics)
    work = model.size * sum(len(example.tokens) for example in examples)
    with threads_for(work), torch.set_grad_enabled(gradients is not None), bind():
        logps = _logprobs(model, examples, loss.silent)
    detached = [logp.detach().float() for logp in logps]

    def on_host() -> list[torch.Tensor]:
        arrays = download(detached)
        _check_logprobs(state, arrays)
        return [tensor_from(array) for array in arrays]

    terms = yield from loss.evaluate(examples, logps, on_host)
    if gradients is not None:
        total = torch.stack([term.surrogate for term in terms]).sum()
        with threads_for(work), bind():  # again: the head's logits are computed again
            _add_gradients(state, gradients, total, leaves)
    return [Term(each.value, each.surrogate.detach(), each.metrics) for each in terms], detached


def _results(
    logprobs: Sequence[torch.Tensor], terms: Sequence[Term]
) -> tuple[list[Array], list[float], list[dict[str, float]]]:
    """Copy a pass's results to the host, all at once: logprobs, losses and metrics by datum."""
    names = [list(term.metrics) for term in terms]
    measured = [numbers for term in terms for numbers in term.metrics.values()]
    found = download([*logprobs, *(term.value for term in terms), *measured])
    count = len(terms)
    sums = iter([math.fsum(numbers.reshape(-1)) for numbers in found[2 * count :]])
    metrics = [{name: next(sums) for name in of_datum} for of_datum in names]
    return found[:count], [float(value) for value in found[count : 2 * count]], metrics


def _check_logprobs(state: RunState, logprobs: Sequence[Array]) -> None:
    """Raise `Diverged` where the model computes NaN: no input is."""
    if any(np.isnan(array).any() for array in logprobs):
        raise diverged(state.arena.views("params"), "the model's logprobs with it are NaN")


def _infinite_loss(values: Sequence[float], total: float) -> str:
    """Say which datum's loss is not finite."""
    wrong = [index for index, value in enumerate(values) if not np.isfinite(value)]
    where = f" in datum {wrong[0]}" if wrong else ""
    value = values[wrong[0]] if wrong else total
    return (
        f"The loss is {value}{where}: logprobs or advantages are too large. No gradient was kept."
    )


def _first_nonfinite(
    model: Model, state: RunState, examples: Sequence[Example], loss: _Loss
) -> Generator[None, None, int | None]:
    """Find the first datum whose gradients are not finite. None: only those of all together."""
    for index, example in enumerate(examples):
        gradients = torch.zeros_like(state.arena.buffers["grads"])
        yield from _micro_batch(model, state, [example], loss, gradients)
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


def micro_batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group datums of similar lengths, with a bound on the tokens of a group.

    Args:
        lengths: lengths of the datums in tokens.
        limit: most tokens of a group.

    Returns:
        Indices of each group's datums, longest datums first.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        tokens += lengths[index]
        if not groups or tokens > limit:
            groups.append([])
            tokens = lengths[index]
        groups[-1].append(index)
    return groups


def _logprobs(
    model: Model, examples: Sequence[Example], silent: str | None = None
) -> list[torch.Tensor]:
    """Compute the logprobs of each datum's targets, in the targets' shape.

    They are packed into one row: what is computed for each token alone needs no padding.

    Args:
        model: the base model.
        examples: the datums.
        silent: input that a target gets no gradient from where it is 0.
    """
    lengths = [len(example.tokens) for example in examples]
    tokens = np.concatenate([example.tokens for example in examples])
    packing = Packing(lengths, MAX_PADDING, model.device)
    hidden = model.text_states(upload(tokens, model.device), packing)
    targets = [example.inputs["target_tokens"] for example in examples]
    columns = max(target[0].size for target in targets)
    grid = upload(
        np.concatenate([_pad_columns(target, columns) for target in targets]), model.device
    )
    known = _rows_with_gradient(examples, silent) if is_accelerator(model.device) else None
    wanted = None if known is None else upload(known, model.device)
    rows = torch.split(model.target_logprobs(hidden, grid, wanted), lengths)
    return [
        row[:, : target[0].size].reshape(target.shape)
        for row, target in zip(rows, targets, strict=True)
    ]


def _rows_with_gradient(examples: Sequence[Example], silent: str | None) -> Array | None:
    """Return which of the packed tokens may get a gradient, as the host knows. None: any."""
    if silent is None or any(silent not in example.inputs for example in examples):
        return None
    inputs = [example.inputs[silent] for example in examples]
    heard = [(each != 0).reshape(len(each), -1).any(-1) for each in inputs]
    return np.flatnonzero(np.concatenate(heard))


def _pad_columns(target: Array, columns: int) -> Array:
    """Return a datum's targets as [T, columns]. Added columns are token 0 and unused."""
    grid = target.reshape(len(target), -1)
    return np.pad(grid, ((0, 0), (0, columns - grid.shape[1])))


def _add_gradients(
    state: RunState, gradients: torch.Tensor, loss: torch.Tensor, leaves: Mapping[str, torch.Tensor]
) -> None:
    """Differentiate a loss and add its gradients to a buffer of the arena's layout."""
    computed = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    parts = split(gradients, state.arena.shapes).values()
    found = [each for each in zip(parts, computed, strict=True) if each[1] is not None]
    if found:
        torch._foreach_add_(*map(list, zip(*found, strict=True)))
