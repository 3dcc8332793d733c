"""Attention of short texts: equal to torch's, with its gradients, and used where it is faster."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from everstep.engine import Model
from everstep.engine.kernels.short_attention import MAX_LENGTHS, ShortAttention
from tests.engine.helpers import backward, examples, trained

SHAPES = [(3, 4, 2, 9, 8, 8), (1, 2, 2, 1, 4, 4), (2, 6, 2, 17, 16, 8)]
"""Texts, heads, heads of keys, length, width of keys and of values."""


def heads(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys, values and a gradient, laid out as a model's projections are."""
    count, queries, keys, length, width, value_width = shape
    random = torch.Generator().manual_seed(3)
    q, k, v, g = (
        torch.randn(count, length, number, size, generator=random).to(dtype).transpose(1, 2)
        for number, size in (
            (queries, width),
            (keys, width),
            (keys, value_width),
            (queries, value_width),
        )
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    output: torch.Tensor = ShortAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    return output


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_torchs_attention(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, k, v, g = heads(shape, dtype)
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    q64, k64, v64 = exact
    expected = functional.scaled_dot_product_attention(
        q64, k64, v64, is_causal=True, scale=0.3, enable_gqa=True
    )
    output = ours(q, k, v, 0.3)
    assert output.dtype == dtype
    assert output.shape == expected.shape
    found = [output.detach(), *torch.autograd.grad(output, (q, k, v), g)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, g.double())]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    largest = max(float(each.norm()) for each in wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < tolerance * max(float(other.norm()), 1e-2 * largest)


def test_a_token_sees_no_later_one() -> None:
    q, k, v, _ = heads((2, 4, 2, 12, 8, 8), torch.float32)
    before = ours(q, k, v, 0.3)
    with torch.no_grad():
        k[:, :, 7:] += 1
        v[:, :, 7:] -= 1
    after = ours(q, k, v, 0.3)
    assert torch.equal(before[:, :, :7], after[:, :, :7])
    assert not torch.equal(before[:, :, 7], after[:, :, 7])


def test_a_text_has_the_same_bits_beside_other_texts() -> None:
    q, k, v, g = heads((3, 4, 2, 16, 8, 8), torch.float32)
    random = torch.Generator().manual_seed(8)
    output = ours(q, k, v, 0.3)
    gradients = torch.autograd.grad(output, (q, k, v), g)
    changed = q.detach().clone()
    for text in (0, 2):
        changed[text] = torch.randn(changed[text].shape, generator=random)
    changed.requires_grad_()
    beside = ours(changed, k, v, 0.3)
    assert torch.equal(output[1], beside[1])
    assert not torch.equal(output[0], beside[0])
    for one, other in zip(gradients, torch.autograd.grad(beside, (changed, k, v), g), strict=True):
        assert torch.equal(one[1], other[1])


def test_only_texts_up_to_a_length_are_attended_so(llama: Model) -> None:
    longest = MAX_LENGTHS[torch.float32]
    state = trained(llama)
    names = "ShortAttentionBackward", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    for length, expected in ((longest, (2, 0)), (longest + 1, (0, 2))):
        with torch.profiler.profile() as profile:
            backward(llama, state, examples(1, (length,)))
        counts = {event.key: event.count for event in profile.key_averages()}
        assert tuple(counts.get(name, 0) for name in names) == expected
