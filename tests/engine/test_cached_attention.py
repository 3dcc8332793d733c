"""Cached attention: a lone query attends over its request's cache, and copies none of it.

Sequences of one request read the prompt that they share once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from everstep.engine import Model, SampleSpec
from everstep.engine.models import kv_cache
from everstep.engine.models.attention import (
    AttentionSettings,
    CachedRows,
    attend_cached,
)
from everstep.engine.models.kv_cache import KvCache
from tests.engine.helpers import OperationCount, prompt, random_adapter, sample, sample_all

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


# A prompt that sequences share


def branched(
    heads: int, length: int, dtype: torch.dtype, rows: int = ROWS, width: int = WIDTH
) -> tuple[KvCache, list[torch.Tensor]]:
    """Create a cache of a prompt with several sequences. Returns it, and their keys and values."""
    cache = KvCache()
    both = [numbers(1, heads, length, each, dtype=dtype) for each in (WIDTH, width)]
    cache.append(0, *both)
    cache.branch(rows)
    return cache, [each.expand(rows, -1, -1, -1) for each in both]


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of any size are shared."""
    monkeypatch.setattr(kv_cache, "_MIN_SHARED_BYTES", 0)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 2, 9, 500])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (4, 1)])
def test_sequences_attend_to_their_prompt_and_to_their_own(
    heads: int, key_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    cache, (keys, values) = branched(key_heads, 70, dtype)
    settings = AttentionSettings(None, window, None)
    rows = list(range(ROWS))
    for step in range(6):
        query = 3 * numbers(len(rows), heads, 1, WIDTH, dtype=dtype)
        key, value = (numbers(len(rows), key_heads, 1, WIDTH, dtype=dtype) for _ in range(2))
        part = [CachedRows(slice(0, len(rows)), cache)]
        found = attend_cached(0, query, key, value, part, settings)
        keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
        expected = exact(query, keys, values, window)
        assert cache.prompt(0) is not None
        tolerance = 2e-6 if dtype == torch.float32 else 2**-7
        assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
        if step == 2:  # a sequence ends
            rows = [0, 2]
            cache.select_rows(rows)
            keys, values = keys[rows], values[rows]


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize(("width", "softcap"), [(WIDTH, 2.0), (8, None)])
def test_attention_that_cannot_be_merged_has_a_copy_of_the_prompt(
    width: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attended() -> list[torch.Tensor]:
        torch.manual_seed(3)
        cache, _ = branched(2, 30, torch.float32, width=width)
        settings = AttentionSettings(None, None, softcap)
        part = [CachedRows(slice(0, ROWS), cache)]
        results = []
        for _ in range(3):
            query, key = (numbers(ROWS, n, 1, WIDTH, dtype=torch.float32) for n in (4, 2))
            value = numbers(ROWS, 2, 1, width, dtype=torch.float32)
            results.append(attend_cached(0, query, key, value, part, settings))
        return results

    found = attended()
    monkeypatch.setattr(kv_cache, "_MIN_SHARED_BYTES", 1 << 40)
    assert all(map(torch.equal, found, attended()))


def test_a_large_prompt_is_not_copied_for_its_sequences() -> None:
    rows = 32
    with OperationCount() as counted:
        cache, (keys, _) = branched(4, 1024, torch.float32, rows)
        prompt = keys[0].nbytes
        assert rows * prompt > 4 << 20
        query = numbers(rows, 4, 1, WIDTH, dtype=torch.float32)
        both = [numbers(rows, 4, 1, WIDTH, dtype=torch.float32) for _ in range(2)]
        part = [CachedRows(slice(0, rows), cache)]
        attend_cached(0, query, both[0], both[1], part, AttentionSettings(None, None, None))
    own = rows * 4 * 64 * WIDTH * 4  # the first capacity of the sequences' own cache
    assert 0 < counted.largest <= max(prompt, own)


def spec(samples: int) -> SampleSpec:
    """Create a request whose sequences end at different positions."""
    stops = tuple(range(0, 256, 8))
    return SampleSpec(prompt(*range(3, 40)), samples, max_tokens=24, stop_tokens=stops, seed=7)


@pytest.mark.usefixtures("shares")
def test_samples_of_a_shared_prompt_keep_their_bits_among_others(model: Model) -> None:
    used = random_adapter(model, 1)
    requests = [(spec(5), used), (spec(3), None), (spec(1), used)]
    for request, among in zip(requests, sample_all(model, requests), strict=True):
        alone = sample(model, *request)
        assert alone.sequences
        for one, other in zip(alone.sequences, among.sequences, strict=True):
            assert one.tokens.tobytes() == other.tokens.tobytes()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_samples_of_a_shared_prompt_are_those_of_copies(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = sample(model, spec(6))
    monkeypatch.setattr(kv_cache, "_MIN_SHARED_BYTES", 0)
    shared = sample(model, spec(6))
    assert len({len(each.tokens) for each in copied.sequences}) > 1, "they end at several positions"
    for one, other in zip(shared.sequences, copied.sequences, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_prompt_is_computed_once_for_all_its_samples(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    hidden = llama.hidden

    def watched(tokens: torch.Tensor, **more: Any) -> torch.Tensor:
        computed.append(tokens.numel())
        return hidden(tokens, **more)

    monkeypatch.setattr(llama, "hidden", watched)
    sample(llama, spec(16))
    assert computed == [len(spec(16).tokens)]
