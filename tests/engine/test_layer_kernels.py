"""Kernels of the direct layers: values and gradients of the operations that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from everstep.engine.kernels import shared_input
from everstep.engine.kernels.elementwise import Gate, RmsNorm, Rotate
from everstep.engine.kernels.products import MIN_MULTIPLICATIONS, linear
from everstep.engine.kernels.shared_input import AdaptedProducts, Projection

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
Operation = Callable[..., torch.Tensor]


def numbers(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(dtype).requires_grad_()


def compare(ours: Operation, theirs: Operation, inputs: Sequence[torch.Tensor]) -> None:
    """Compare values to the bit, and gradients to rounding."""
    found, expected = ours(*inputs), theirs(*inputs)
    assert torch.equal(found, expected)
    gradient = numbers(*expected.shape, dtype=expected.dtype, seed=9).detach()
    tolerance = 1e-6 if expected.dtype == torch.float32 else 1e-2
    for one, other in zip(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        assert one.dtype == other.dtype
        assert (one - other).norm() < tolerance * other.norm()


@DTYPES
def test_norm_equals_that_of_transformers(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(24, eps=1e-3).to(dtype).requires_grad_(False)
    module.weight += 0.3 * numbers(24, dtype=dtype).detach()
    x = numbers(5, 3, 24, dtype=dtype, seed=2)
    compare(lambda x: RmsNorm.apply(x, module.weight, 1e-3), module, [x])  # type: ignore[no-untyped-call]


@DTYPES
def test_rotation_equals_that_of_transformers(dtype: torch.dtype) -> None:
    x = numbers(7, 3, 8, dtype=dtype)
    angles = torch.linspace(0, 9, 7).unsqueeze(1) * torch.tensor([1.0, 0.5, 0.2, 0.1])
    cosines, sines = (f(angles).repeat(1, 2).to(dtype) for f in (torch.cos, torch.sin))
    signed = torch.cat((-sines[:, :4], sines[:, 4:]), 1).unsqueeze(1)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        rotated, _ = apply_rotary_pos_emb(x, x, cosines, sines, unsqueeze_dim=1)
        return rotated  # type: ignore[no-any-return]

    compare(lambda x: Rotate.apply(x, cosines.unsqueeze(1), signed), theirs, [x])  # type: ignore[no-untyped-call]


@DTYPES
def test_gate_equals_silu_times_its_input(dtype: torch.dtype) -> None:
    inputs = [numbers(6, 10, dtype=dtype), numbers(6, 10, dtype=dtype, seed=2)]
    compare(Gate.apply, lambda gate, up: functional.silu(gate) * up, inputs)


@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("size", [8, 256])
@DTYPES
def test_products_of_one_input_equal_those_of_each(
    adapted: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    widths, rank = (2 * size, size, size), size // 4
    x = numbers(2 * size, size, dtype=dtype)
    weights = [numbers(w, size, dtype=dtype, seed=w + i) for i, w in enumerate(widths)]
    bias = numbers(size, dtype=dtype).detach()
    projections = [Projection(w.detach(), bias if i else None) for i, w in enumerate(weights)]
    projections[0] = Projection(weights[0].detach(), None)
    a = [numbers(rank, size, dtype=torch.float32, seed=20 + i) for i in adapted]
    b = [numbers(widths[i], rank, dtype=torch.float32, seed=30 + i) for i in adapted]
    found = AdaptedProducts.apply(x, 0.5, tuple(projections), adapted, *a, *b)  # type: ignore[no-untyped-call]
    exact = [each.detach().double().requires_grad_() for each in (x, *a, *b)]
    expected = []
    for index, each in enumerate(projections):
        bias64 = None if each.bias is None else each.bias.double()
        y = functional.linear(exact[0], each.weight.double(), bias64)
        if index in adapted:
            place = 1 + adapted.index(index)
            y = y + 0.5 * (exact[0] @ exact[place].t()) @ exact[place + len(adapted)].t()
        expected.append(y)
    gradients = [numbers(*y.shape, dtype=dtype, seed=40 + i) for i, y in enumerate(found)]
    results = [*found, *torch.autograd.grad(found, (x, *a, *b), gradients)]
    wide = [each.double() for each in gradients]
    wanted = [*expected, *torch.autograd.grad(expected, exact, wide)]
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    for one, other in zip(results, wanted, strict=True):
        assert one.dtype in (dtype, torch.float32)
        assert (one - other).norm() < tolerance * other.norm()
    assert (2 * size * size * size >= MIN_MULTIPLICATIONS) is (size == 256)


def test_products_of_an_input_without_gradient_compute_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = numbers(6, 8, dtype=torch.float32)
    weight = numbers(12, 8, dtype=torch.float32, seed=2).detach()
    a, b = numbers(2, 8, dtype=torch.float32), numbers(12, 2, dtype=torch.float32)
    calls: list[int] = []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(len(args))
        return linear(*args)

    monkeypatch.setattr(shared_input, "linear", counted)
    found = []
    for given in (x, x.detach()):
        (y,) = AdaptedProducts.apply(given, 0.5, (Projection(weight, None),), (0,), a, b)  # type: ignore[no-untyped-call]
        calls.clear()
        torch.autograd.grad(y.sum(), (a, b))
        found.append(len(calls))
    assert found[0] > found[1] > 0
