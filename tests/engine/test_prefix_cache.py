"""Prefix cache: reused blocks have the bits of computing them again, for every shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everstep.engine import Model, SampleSpec, SamplingBatch, load_model
from everstep.engine.run_state import Adapter
from everstep.engine.sampling.prefix_cache import BLOCK, PrefixCache
from everstep.wire.codecs.proto import SampleOutput, encode_sample_response
from tests.engine.helpers import check_sequences, random_adapter

LENGTHS = (BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 16, BLOCK + 57, 2 * BLOCK - 9)
"""Lengths of prompts. The tiny models have room for almost two blocks."""
LIMIT = 64 << 20


def text(length: int, seed: int = 0, begin: int = BLOCK) -> Any:
    """Create a prompt that equals the others before a position and differs after it."""
    shared = np.random.default_rng(99).integers(0, 256, begin)
    own = np.random.default_rng(seed).integers(0, 256, length)
    return np.concatenate([shared, own])[:length].astype(np.int64)


def spec(length: int, seed: int = 0, **more: Any) -> SampleSpec:
    return SampleSpec(
        text(length, seed), num_samples=2, max_tokens=6, seed=seed, use_eos=False, **more
    )


def run(batch: SamplingBatch, *requests: tuple[SampleSpec, Adapter | None, str | None]) -> Any:
    """Run requests one after another, each to its end."""
    outputs = []
    for request, adapter, namespace in requests:
        batch.add("k", request, adapter, namespace)
        finished: list[Any] = []
        while batch.busy:
            finished += batch.step()
        ((_, output),) = finished
        assert isinstance(output, SampleOutput), output
        check_sequences(output, request)
        outputs.append(output)
    return outputs


def bits(output: SampleOutput) -> bytes:
    return encode_sample_response(replace(output, prompt_cache_hit_tokens=0))


def check_shapes(model: Model, adapter: Adapter | None) -> None:
    """Compare prompts of every length that reuse blocks with the same prompts alone."""
    prefixes = PrefixCache(LIMIT)
    batch = SamplingBatch(model, prefixes)
    run(batch, (spec(LENGTHS[-1], 1000), adapter, "namespace"))
    kept = prefixes.nbytes
    assert kept > 0
    for number, length in enumerate(LENGTHS):
        request = spec(length, number)
        (reused,) = run(batch, (request, adapter, "namespace"))
        (alone,) = run(SamplingBatch(model), (request, adapter, None))
        assert alone.prompt_cache_hit_tokens == 0
        assert reused.prompt_cache_hit_tokens == (length - 1) // BLOCK * BLOCK, length
        assert bits(reused) == bits(alone), length
    assert prefixes.nbytes == kept, "the prompts share their blocks"


def test_reused_blocks_have_the_same_bits_in_every_family(model: Model) -> None:
    check_shapes(model, random_adapter(model, 1))


def test_reused_blocks_of_the_base_model_have_the_same_bits(llama: Model) -> None:
    check_shapes(llama, None)


def test_reused_blocks_have_the_same_bits_in_bfloat16(directories: dict[str, Path]) -> None:
    for family in ("llama", "gemma2"):
        model = load_model(family, str(directories[family]), device="cpu", dtype="bfloat16")
        assert next(model.module.parameters()).dtype == torch.bfloat16
        check_shapes(model, random_adapter(model, 1))


@pytest.fixture(scope="module")
def pico_model(pico: Path) -> Model:
    return load_model("pico", str(pico), device="cpu")


@pytest.mark.parametrize("length", [3 * BLOCK, 3 * BLOCK + 1, 5 * BLOCK + 77, 9 * BLOCK - 1])
def test_reused_blocks_have_the_same_bits_in_long_prompts(pico_model: Model, length: int) -> None:
    batch = SamplingBatch(pico_model, PrefixCache(LIMIT))
    first = SampleSpec(text(length, 1, 2 * BLOCK + 20), max_tokens=3, seed=1)
    second = replace(first, tokens=text(length, 2, 2 * BLOCK + 20))
    outputs = run(batch, (first, None, "s"), (second, None, "s"), (first, None, "s"))
    whole = (length - 1) // BLOCK * BLOCK
    assert [o.prompt_cache_hit_tokens for o in outputs] == [0, 2 * BLOCK, whole]
    for request, output in zip((first, second, first), outputs, strict=True):
        (alone,) = run(SamplingBatch(pico_model), (request, None, None))
        assert bits(output) == bits(alone)


SCORES: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"prompt_logprobs": True, "topk_prompt_logprobs": 3},
    "last": {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_logprobs_last_n": 30},
    "draws": {"prompt_alt_tokens_k": 2},
    "all targets": {"first_target": 0},
    "late targets": {"first_target": 2 * BLOCK + 3},
    "no target": {"first_target": 10_000},
}
HITS = {"none": 2, "last": 2, "late targets": 2, "no target": 2}
"""Blocks that can be reused: those before the first position to score."""


@pytest.mark.parametrize("scores", list(SCORES))
def test_prompt_scores_are_the_same_and_reuse_the_blocks_before_them(
    pico_model: Model, scores: str
) -> None:
    length = 2 * BLOCK + 60
    asked = dict(SCORES[scores])
    first_target = asked.pop("first_target", None)
    if first_target is not None:
        targets = np.full((length - 1, 2), -1, dtype=np.int64)
        targets[first_target:, 0] = 7
        asked["target_prompt_logprobs"] = targets
    request = SampleSpec(text(length), max_tokens=2, seed=5, **asked)
    batch = SamplingBatch(pico_model, PrefixCache(LIMIT))
    cold, warm = run(batch, (request, None, "s"), (request, None, "s"))
    assert warm.prompt_cache_hit_tokens == HITS.get(scores, 0) * BLOCK
    assert bits(cold) == bits(warm)


def test_blocks_are_not_shared_between_namespaces(pico_model: Model) -> None:
    request = SampleSpec(text(2 * BLOCK), max_tokens=1)
    batch = SamplingBatch(pico_model, PrefixCache(LIMIT))
    namespaces = ("a", "b", None, None, "a")
    outputs = run(batch, *((request, None, namespace) for namespace in namespaces))
    assert [o.prompt_cache_hit_tokens for o in outputs] == [0, 0, 0, 0, BLOCK]


def test_memory_is_bounded_and_recent_blocks_stay(pico_model: Model) -> None:
    prefixes = PrefixCache(LIMIT)
    batch = SamplingBatch(pico_model, prefixes)
    run(batch, (SampleSpec(text(2 * BLOCK), max_tokens=1), None, "s"))
    block = prefixes.nbytes // 2
    small = PrefixCache(3 * block + 1)
    batch = SamplingBatch(pico_model, small)
    hits = []
    for seed in (1, 2, 1, 3, 1, 2):
        request = SampleSpec(text(2 * BLOCK + 1, seed, BLOCK), max_tokens=1)
        hits.append(run(batch, (request, None, "s"))[0].prompt_cache_hit_tokens // BLOCK)
        assert small.nbytes <= 3 * block
    assert hits == [0, 1, 2, 1, 2, 1]
    tiny = SamplingBatch(pico_model, PrefixCache(block - 1))
    request = SampleSpec(text(2 * BLOCK), max_tokens=1)
    assert [o.prompt_cache_hit_tokens for o in run(tiny, *[(request, None, "s")] * 2)] == [0, 0]


def test_eviction_drops_a_prompts_last_blocks_first(pico_model: Model) -> None:
    cache = PrefixCache(LIMIT)
    run(SamplingBatch(pico_model, cache), (SampleSpec(text(BLOCK), max_tokens=1), None, "s"))
    batch = SamplingBatch(pico_model, PrefixCache(2 * cache.nbytes))
    two_blocks = SampleSpec(text(2 * BLOCK + 1, 1, begin=0), max_tokens=1)
    other = SampleSpec(text(BLOCK + 1, 2, begin=0), max_tokens=1)
    outputs = run(batch, *((request, None, "s") for request in (two_blocks, other, two_blocks)))
    assert [o.prompt_cache_hit_tokens // BLOCK for o in outputs] == [0, 0, 1]


def test_a_prompt_can_be_cancelled_between_its_blocks(pico_model: Model) -> None:
    request = SampleSpec(text(4 * BLOCK), max_tokens=2, seed=1)
    batch = SamplingBatch(pico_model, PrefixCache(LIMIT))
    batch.add("gone", request, None, "s")
    assert batch.step() == []
    assert batch.holds("gone")
    batch.cancel("gone")
    assert not batch.holds("gone")
    assert not batch.busy
    (output,) = run(batch, (request, None, "s"))
    (alone,) = run(SamplingBatch(pico_model), (request, None, None))
    assert bits(output) == bits(alone)
