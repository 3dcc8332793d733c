"""Output head: equal to a plain computation of the logits, without their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from everstep.engine import Model, RunState
from everstep.wire.messages.passes import Example
from tests.engine.helpers import backward, buffers, examples, trained

PIECE = 8
HEAD_CELLS = "everstep.engine.models.model.HEAD_CELLS"


class Matrices(TorchDispatchMode):
    """Records the matrices of a width that operations compute: the operation and the rows."""

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width = width
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.ndim > 1 and each.shape[-1] == self.width:
                self.found.append((func.__name__, each.numel() // self.width))
        return result


def plain(model: Model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the targets' logprobs with all logits of a piece in the graph."""
    logprobs = []
    for states, ids in zip(torch.split(hidden, PIECE), torch.split(targets, PIECE), strict=True):
        logits = model.logits(states)
        logprobs.append(logits.gather(-1, ids) - torch.logsumexp(logits, -1, keepdim=True))
    return torch.cat(logprobs)


def gradients(
    model: Model,
    state: RunState,
    logprobs_of: Callable[[Model, torch.Tensor, torch.Tensor], torch.Tensor],
    columns: int,
    weights: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return the logprobs of two pieces of hidden states, and their gradients."""
    random = torch.Generator().manual_seed(4)
    hidden = torch.randn(2 * PIECE - 3, 32, generator=random).requires_grad_()
    targets = torch.randint(0, 259, (len(hidden), columns), generator=random)
    given = torch.rand(targets.shape, generator=random) if weights is None else weights
    leaves = state.leaves()
    with model.bind_weights(state.layout, leaves):
        logprobs = logprobs_of(model, hidden, targets)
        found = torch.autograd.grad(
            (logprobs * given).sum(), [hidden, *leaves.values()], allow_unused=True
        )
    used = [each for each in found if each is not None]
    assert len(used) == 3, "hidden states, A and B of the head"
    return [logprobs.detach(), *used]


def test_logprobs_and_gradients_equal_a_plain_head_bit_for_bit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEAD_CELLS, PIECE * model.info.vocab_size)
    state = trained(model)
    ours = gradients(model, state, Model.target_logprobs, 1)
    theirs = gradients(model, state, plain, 1)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_several_targets_a_position_equal_a_plain_head(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEAD_CELLS, PIECE * 259)
    state = trained(llama)
    ours = gradients(llama, state, Model.target_logprobs, 3)
    theirs = gradients(llama, state, plain, 3)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_positions_without_weight_have_logprobs_and_no_gradient(llama: Model) -> None:
    state = trained(llama)
    weights = (torch.arange(2 * PIECE - 3) % 3 == 1).float().unsqueeze(1)
    ours = gradients(llama, state, Model.target_logprobs, 1, weights)
    theirs = gradients(llama, state, plain, 1, weights)
    assert (ours[0] - theirs[0]).abs().max() < 1e-6
    assert torch.equal(ours[1][weights[:, 0] == 0], torch.zeros(9, 32))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_a_pass_without_weights_adds_no_gradient(llama: Model) -> None:
    state = trained(llama)
    before = buffers(state)["grads"]
    data = [
        Example(e.tokens, {**e.inputs, "weights": np.zeros(len(e.tokens), np.float32)})
        for e in examples(1)
    ]
    result = backward(llama, state, data)
    assert all((output["logprobs"] < 0).all() for output in result.outputs)
    assert buffers(state)["grads"] == before


def test_logits_of_all_tokens_never_exist_at_once(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEAD_CELLS, PIECE * 259)
    data = examples(2, (40, 30))
    state = trained(llama, steps=0)
    with Matrices(259) as seen:
        backward(llama, state, data)
    computed = [rows for name, rows in seen.found if name != "t.default"]
    assert max(computed) == PIECE


def test_logits_are_computed_again_only_where_a_loss_has_weights(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HEAD_CELLS, PIECE * 259)
    (example,) = examples(2, (4 * PIECE,))
    weights = np.zeros(4 * PIECE, np.float32)
    weights[-3:] = 1
    data = [Example(example.tokens, {**example.inputs, "weights": weights})]
    state = trained(llama, steps=0)
    with Matrices(259) as seen:
        backward(llama, state, data)
    one_hot = [rows for name, rows in seen.found if name == "scatter_add_.default"]
    assert one_hot == [3]
