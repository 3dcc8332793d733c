"""Adapted product: its values and gradients, and what it computes for them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from everstep.engine import Model
from everstep.engine.kernels import low_rank, products
from everstep.engine.kernels.low_rank import AdaptedProduct
from everstep.engine.models.lora import AdapterBinding
from tests.engine.helpers import backward, examples, trained

SMALL = (24, 16, 40, 4)
LARGE = (320, 192, 256, 32)
"""Rows, inputs, outputs and rank. oneDNN computes the products of the large one."""


def operands(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width_in, width_out, rank = sizes
    random = torch.Generator().manual_seed(1)
    x, weight, a, b, gradient = (
        torch.randn(shape, generator=random)
        for shape in (
            (rows, width_in),
            (width_out, width_in),
            (rank, width_in),
            (width_out, rank),
            (rows, width_out),
        )
    )
    return (
        x.to(dtype).requires_grad_(),
        weight.to(dtype),
        a.requires_grad_(),
        b.requires_grad_(),
        gradient.to(dtype),
    )


def ours(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = AdaptedProduct.apply(x, x.detach().float(), weight, None, a, b, 0.5)  # type: ignore[no-untyped-call]
    return product


def plain(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    low = functional.linear(functional.linear(x.to(a.dtype), a), b) * 0.5
    return functional.linear(x, weight) + low.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_products_equal_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, a, b, gradient = operands(SMALL, dtype)
    found, expected = ours(x, weight, a, b), plain(x, weight, a, b)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, (x, a, b), gradient),
        torch.autograd.grad(expected, (x, a, b), gradient),
        strict=True,
    ):
        assert one.shape == other.shape
        assert (one - other).norm() <= (1e-6 if one.dtype == torch.float32 else 1e-2) * other.norm()


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_products_are_as_near_to_float64_as_torchs(sizes: tuple[int, int, int, int]) -> None:
    x, weight, a, b, gradient = operands(sizes, torch.float32)
    exact = [each.detach().double().requires_grad_() for each in (x, weight, a, b)]
    value = plain(*exact)
    wanted = [value, *torch.autograd.grad(value, [exact[0], *exact[2:]], gradient.double())]
    found = ours(x, weight, a, b)
    results = [found, *torch.autograd.grad(found, (x, a, b), gradient)]
    for one, other in zip(results, wanted, strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_large_products_are_onednns_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, *_ = operands(LARGE, torch.float32)
    assert x.shape[0] * weight.numel() >= products.MIN_MULTIPLICATIONS
    monkeypatch.setattr(products, "_X86", False)
    theirs = products.linear(x, weight)
    assert torch.equal(theirs, functional.linear(x, weight))
    monkeypatch.undo()
    assert torch.allclose(products.linear(x, weight), theirs, rtol=1e-4, atol=1e-4)
    transposed = products.linear(x.detach().t().contiguous().t(), weight.t().contiguous().t())
    assert torch.allclose(transposed, theirs, rtol=1e-4, atol=1e-4)
    assert transposed.is_contiguous()


def test_an_input_without_gradient_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, a, b, gradient = operands(SMALL, torch.float32)
    calls: list[int] = []

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(len(args))
        return products.linear(*args)

    monkeypatch.setattr(low_rank, "linear", counted)
    torch.autograd.grad(ours(x, weight, a, b), (a, b), gradient)
    before = len(calls)
    torch.autograd.grad(ours(x.detach(), weight, a, b), (a, b), gradient)
    assert before > len(calls) - before > 0


def test_projections_of_one_input_share_its_conversion() -> None:
    binding = AdapterBinding()
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    with binding.bind():
        wide = binding.widen(x, torch.float32)
        assert wide.dtype == torch.float32
        assert binding.widen(x, torch.float32) is wide
        x.mul_(2)
        assert float(binding.widen(x, torch.float32).sum()) == 12
        other = torch.zeros_like(x)
        assert float(binding.widen(other, torch.float32).sum()) == 0
    with binding.bind():
        assert binding.widen(other, torch.float32) is not wide


def test_memory_is_not_filled_before_results_are_written(llama: Model) -> None:
    state = trained(llama)
    with torch.profiler.profile(record_shapes=True) as profile:
        backward(llama, state, examples(1))
    events = profile.key_averages(group_by_input_shape=True)
    assert any(
        event.key == "mkldnn::_linear_pointwise" or event.key == "aten::mm" for event in events
    )
    filled = sum(event.count for event in events if event.key == "aten::fill_")
    products_made = sum(
        event.count for event in events if event.key in ("aten::mm", "aten::linear")
    )
    assert filled < products_made / 4
