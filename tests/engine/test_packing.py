"""Packing: texts in one row are computed as each alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everstep.engine import Model
from everstep.engine.kernels.packing import Packing, TextGroup
from everstep.engine.models.attention import packed
from everstep.engine.training_pass import MAX_PADDING
from tests.engine.helpers import backward, examples, forward, trained

LENGTHS = (24, 23, 20, 20, 11, 11, 5, 1)


def test_packed_texts_have_the_hidden_states_of_each_alone(model: Model) -> None:
    data = examples(5, LENGTHS)
    packing = Packing(LENGTHS, MAX_PADDING, model.device)
    assert [group.count for group in packing.groups] == [4, 2, 1, 1]
    tokens = torch.from_numpy(np.concatenate([example.tokens for example in data]))
    with torch.no_grad():
        with packed(packing):
            together = model.hidden(tokens.unsqueeze(0), position_ids=packing.positions)[0]
        for example, found in zip(data, together.split(list(LENGTHS)), strict=True):  # type: ignore[no-untyped-call]
            alone = model.hidden(torch.from_numpy(example.tokens).unsqueeze(0))[0]
            assert (found - alone).abs().max() < 1e-5 * alone.abs().max()


def test_packed_texts_have_the_gradients_of_each_alone(model: Model) -> None:
    data = examples(5, LENGTHS)
    together, alone = trained(model), trained(model)
    backward(model, together, data)
    for example in data:
        backward(model, alone, [example])
    expected = alone.arena.buffers["grads"]
    assert expected.norm() > 1
    assert (together.arena.buffers["grads"] - expected).norm() < 1e-6 * expected.norm()


def test_a_text_does_not_depend_on_the_tokens_of_its_neighbours(llama: Model) -> None:
    state = trained(llama)
    mine, others = examples(1, (20,)), examples(2, (23, 20, 17, 6))
    changed = [*examples(3, (23, 20, 17, 6))]
    first = forward(llama, state, [others[0], *mine, *others[1:]]).outputs
    second = forward(llama, state, [changed[0], *mine, *changed[1:]]).outputs
    assert first[1]["logprobs"].tobytes() == second[1]["logprobs"].tobytes()
    assert first[0]["logprobs"].tobytes() != second[0]["logprobs"].tobytes()


@pytest.mark.parametrize("lengths", [(3, 3), (4, 3, 4), (1,)])
def test_a_grid_holds_each_texts_tokens_and_back(lengths: tuple[int, ...]) -> None:
    group = TextGroup.of(lengths, torch.device("cpu"))
    x = torch.arange(1.0, 2 * sum(lengths) + 1).reshape(1, sum(lengths), 2).requires_grad_()
    grid = group.grid(x)
    assert grid.shape == (len(lengths), 1, max(lengths), 2)
    begin = 0
    for row, length in enumerate(lengths):
        assert torch.equal(grid[row, 0, :length], x[0, begin : begin + length])
        begin += length
    flat = group.flat(grid)
    assert torch.equal(flat.transpose(0, 1), x)
    weights = torch.rand(flat.shape)
    (gradient,) = torch.autograd.grad((flat * weights).sum(), x)
    assert torch.equal(gradient, weights.transpose(0, 1))
