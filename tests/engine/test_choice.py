"""Tokens are drawn by the seed, from what temperature, top_k and top_p leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from everstep.engine import AdapterConfig, Model, SampleSpec, SamplingBatch
from everstep.engine.choice import choose, likeliest, log_softmax, stream
from everstep.engine.errors import InputError
from everstep.wire.proto import SampleOutput
from tests.engine.helpers import adapter, prompt, random_adapter, sample

Array = np.ndarray[Any, Any]
ROW = np.random.default_rng(0).normal(0, 1.5, 50).astype(np.float32)
DRAWS = 20_000


def softmax(logits: Array) -> Array:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def expected(temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> Array:
    """The distribution by its definition: scale, keep the k likeliest, then the nucleus."""
    scaled = softmax(ROW / temperature)
    order = np.argsort(-scaled)
    kept = order[: top_k if top_k > 0 else None]
    cumulated = np.cumsum(scaled[kept] / scaled[kept].sum())
    kept = kept[: int((cumulated < top_p).sum()) + 1]
    result = np.zeros_like(scaled)
    result[kept] = scaled[kept] / scaled[kept].sum()
    return result


def chi_square(counts: Array, probabilities: Array) -> float:
    """Standard deviations by which chi-square lies above its mean; rare tokens are pooled."""
    assert not counts[probabilities == 0].any(), "a token was drawn that can't be"
    wanted = probabilities * counts.sum()
    rare = wanted < 10
    found = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    return float((((found - wanted) ** 2 / wanted).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 20, "top_p": 0.5},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.9},
        {"top_k": 0},
        {"top_k": 1000},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    spec, random = SampleSpec(prompt(), **settings), stream(11, 0)
    drawn = [choose(ROW, spec, random) for _ in range(DRAWS)]
    counts = np.bincount(drawn, minlength=len(ROW))
    assert chi_square(counts, expected(**settings)) < 4


def test_the_test_of_the_distribution_sees_a_small_difference() -> None:
    spec, random = SampleSpec(prompt(), temperature=1.1), stream(11, 0)
    counts = np.bincount([choose(ROW, spec, random) for _ in range(DRAWS)], minlength=len(ROW))
    assert chi_square(counts, expected()) > 8


def test_a_requests_samples_follow_the_models_distribution(llama: Model) -> None:
    used = random_adapter(llama, 4)
    spec = SampleSpec(prompt(5, 6, 7), 1024, max_tokens=1, seed=2, topk_sample_logprobs=259)
    output = sample(llama, spec, used)
    counts = np.bincount([int(s.tokens[0]) for s in output.sequences], minlength=259)
    top = output.sequences[0].topk
    assert top is not None
    probabilities = np.zeros(259)
    probabilities[top.token_ids[0]] = np.exp(top.logprobs[0])
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert chi_square(counts, probabilities) < 4
    assert (counts > 0).sum() > 50


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}], ids=str)
def test_the_likeliest_token_is_taken(llama: Model, settings: dict[str, Any]) -> None:
    used = random_adapter(llama, 4)
    spec = SampleSpec(prompt(), 2, max_tokens=10, topk_sample_logprobs=3, use_eos=False, **settings)
    one, two = sample(llama, spec, used).sequences
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.topk is not None
    assert one.tokens.tolist() == one.topk.token_ids[:, 0].tolist()
    assert one.logprobs.tobytes() == one.topk.logprobs[:, 0].tobytes()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    spec, random = SampleSpec(prompt(), temperature=temperature, top_p=0.9), stream(0, 0)
    for settings in ({}, {"top_p": 1.0}, {"top_k": 7}):
        assert choose(ROW, replace(spec, **settings), random) == int(ROW.argmax())


def test_among_equals_the_lower_id_comes_first() -> None:
    row = np.array([0.0, 1.0, 1.0, 1.0, -1.0], np.float32)
    spec = SampleSpec(prompt(), temperature=0)
    assert choose(row, spec, stream(0, 0)) == 1
    assert likeliest(log_softmax(row), 4)[0].tolist() == [1, 2, 3, 0]


def test_a_seed_gives_the_same_tokens_and_samples_of_a_request_differ(llama: Model) -> None:
    spec = SampleSpec(prompt(), 4, max_tokens=12, seed=5, use_eos=False)
    first, again = sample(llama, spec), sample(llama, spec)
    for one, other in zip(first.sequences, again.sequences, strict=True):
        assert one.tokens.tobytes() == other.tokens.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
    texts = {tuple(s.tokens.tolist()) for s in first.sequences}
    assert len(texts) == 4
    other_seed = sample(llama, replace(spec, seed=6))
    assert not texts & {tuple(s.tokens.tolist()) for s in other_seed.sequences}


def test_a_sample_does_not_depend_on_how_many_are_asked_for(llama: Model) -> None:
    spec = SampleSpec(prompt(), 5, max_tokens=12, seed=5, use_eos=False)
    five = sample(llama, spec).sequences
    two = sample(llama, replace(spec, num_samples=2)).sequences
    assert [s.tokens.tolist() for s in two] == [s.tokens.tolist() for s in five[:2]]


@pytest.mark.parametrize("seed", [0, 1, 2**53, 2**63 - 1, 2**64 - 1, -1])
def test_streams_of_near_seeds_differ(seed: int) -> None:
    streams = [(seed, 0), (seed, 1), (seed, 2**63), (seed + 1, 0), (seed + 1, 2**63)]
    assert len({stream(*key).random() for key in streams}) == len(streams)
    assert stream(seed, 0).random() == stream(seed, 0).random()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.3}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str
)
def test_logprobs_are_the_models_whatever_tokens_are_drawn_from(
    llama: Model, settings: dict[str, Any]
) -> None:
    spec = SampleSpec(prompt(), 3, max_tokens=5, topk_sample_logprobs=259, **settings)
    for sequence in sample(llama, spec).sequences:
        assert sequence.topk is not None
        assert np.exp(sequence.topk.logprobs).sum(1) == pytest.approx(1, abs=1e-5)
        for token, logprob, ids, values in zip(
            sequence.tokens,
            sequence.logprobs,
            sequence.topk.token_ids,
            sequence.topk.logprobs,
            strict=True,
        ):
            assert logprob == values[ids.tolist().index(token)]


def test_top_k_logprobs_are_the_likeliest_in_order(llama: Model) -> None:
    spec = SampleSpec(prompt(), 2, max_tokens=6, seed=1)
    few = sample(llama, replace(spec, topk_sample_logprobs=4)).sequences
    every = sample(llama, replace(spec, topk_sample_logprobs=259)).sequences
    assert sample(llama, spec).sequences[0].topk is None
    for four, whole in zip(few, every, strict=True):
        assert four.topk is not None
        assert whole.topk is not None
        assert four.topk.token_ids.shape == (len(four.tokens), 4)
        assert four.topk.token_ids.tolist() == whole.topk.token_ids[:, :4].tolist()
        assert (np.diff(whole.topk.logprobs, axis=1) <= 0).all()


# What goes wrong, and for whom


def test_a_diverged_adapter_fails_its_own_request_alone(llama: Model) -> None:
    state = llama.new_run(AdapterConfig(rank=4))
    state.arena.buffers["params"].fill_(1e30)
    batch = SamplingBatch(llama)
    spec = SampleSpec(prompt(), 2, max_tokens=6, seed=1)
    batch.add("good", spec, None)
    batch.add("diverged", spec, adapter(llama, state))
    ended: dict[str, Any] = {}
    while batch.busy:
        ended.update(batch.step())
    assert isinstance(ended["diverged"], InputError)
    assert "diverged" in str(ended["diverged"])
    assert isinstance(ended["good"], SampleOutput)


def test_an_error_while_drawing_ends_one_request_alone(llama: Model) -> None:
    batch = SamplingBatch(llama)
    spec = SampleSpec(prompt(), 2, max_tokens=6, seed=1)
    batch.add("good", spec, None)
    batch.add("bad", spec, None)
    batch.step()
    batch.step()
    batch.step()
    request = batch._active["bad"]
    request.draw = lambda logits: request._draw_one(  # type: ignore[method-assign]
        request.alive[0], np.full(259, np.nan, np.float32)
    )
    ended: dict[str, Any] = {}
    while batch.busy:
        ended.update(batch.step())
    assert isinstance(ended["bad"], InputError)
    (alone,) = [sample(llama, spec)]
    for one, other in zip(ended["good"].sequences, alone.sequences, strict=True):
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_a_cancelled_request_is_forgotten(llama: Model) -> None:
    batch = SamplingBatch(llama)
    for key in "abc":
        batch.add(key, SampleSpec(prompt(), max_tokens=50, use_eos=False), None)
    batch.step()
    batch.cancel("a")
    batch.cancel("c")
    batch.cancel("never heard of")
    ended = []
    while batch.busy:
        ended += batch.step()
    assert [key for key, _ in ended] == ["b"]
