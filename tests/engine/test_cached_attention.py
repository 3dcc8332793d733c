"""Cached attention: a lone query attends over its request's cache, and copies none of it."""

from __future__ import annotations

import pytest
import torch

from everstep.engine.models.attention import (
    AttentionSettings,
    CachedRows,
    KvCache,
    attend_cached,
)
from tests.engine.helpers import OperationCount

ROWS, WIDTH = 3, 16
DTYPES = (torch.float32, torch.bfloat16)


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def filled(heads: int, length: int, dtype: torch.dtype) -> tuple[KvCache, list[torch.Tensor]]:
    """Create a cache of one layer. Returns it, and its keys and values."""
    cache = KvCache()
    both = [numbers(ROWS, heads, length, WIDTH, dtype=dtype) for _ in range(2)]
    cache.append(0, *both)
    return cache, both


def exact(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Compute a lone query's attention in float64, [n, 1, heads, width]."""
    if window is not None:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(repeats, 1) for each in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * WIDTH**-0.5
    attended: torch.Tensor = scores.softmax(-1) @ values
    return attended.transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 8, 500])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (4, 1)])
def test_a_lone_query_attends_to_all_it_may_see(
    heads: int, key_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    cache, (keys, values) = filled(key_heads, 70, dtype)
    settings = AttentionSettings(None, window, None)
    for _ in range(3):
        query = numbers(ROWS, heads, 1, WIDTH, dtype=dtype)
        key, value = (numbers(ROWS, key_heads, 1, WIDTH, dtype=dtype) for _ in range(2))
        found = attend_cached(0, query, key, value, [CachedRows(slice(0, ROWS), cache)], settings)
        keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        expected = exact(query, keys, values, window)
        assert found.shape == expected.shape
        assert found.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lone_query_copies_no_keys(dtype: torch.dtype) -> None:
    cache, (keys, _) = filled(2, 200, dtype)
    query = numbers(ROWS, 8, 1, WIDTH, dtype=dtype)
    key, value = (numbers(ROWS, 2, 1, WIDTH, dtype=dtype) for _ in range(2))
    settings = AttentionSettings(None, None, None)
    with OperationCount() as counted:
        attend_cached(0, query, key, value, [CachedRows(slice(0, ROWS), cache)], settings)
    assert 0 < counted.largest < keys.nbytes / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_positions_are_copied_exactly_and_in_the_dtype_of_the_model(
    dtype: torch.dtype,
) -> None:
    cache, both = filled(2, 100, dtype)
    copied = cache.copy_positions(20, 90)[0]
    for held, given in zip(copied, both, strict=True):
        assert held.dtype == dtype
        assert torch.equal(held, given[:, :, 20:90])
        assert held.data_ptr() != given.data_ptr()
