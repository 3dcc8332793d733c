"""Token choice: tokens follow the seed and the distribution restricted by the settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from everstep.engine import AdapterConfig, Model, SampleSpec, SamplingBatch
from everstep.engine.errors import InputError
from everstep.engine.sampling import token_choice
from everstep.engine.sampling.token_choice import choose, draw, log_softmax, stream, top_tokens
from everstep.wire.codecs.proto import SampleOutput
from tests.engine.helpers import adapter, prompt, random_adapter, sample

Array = np.ndarray[Any, Any]
ROW = np.random.default_rng(0).normal(0, 1.5, 50).astype(np.float32)
DRAWS = 20_000


def softmax(logits: Array) -> Array:
    weights: Array = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(weights / weights.sum())


def expected(temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> Array:
    """Compute the distribution by definition: scale, keep the top k tokens, then the nucleus."""
    scaled = softmax(ROW / temperature)
    order = np.argsort(-scaled)
    kept = order[: top_k if top_k > 0 else None]
    cumulated = np.cumsum(scaled[kept] / scaled[kept].sum())
    kept = kept[: int((cumulated < top_p).sum()) + 1]
    result = np.zeros_like(scaled)
    result[kept] = scaled[kept] / scaled[kept].sum()
    return result


def chi_square(counts: Array, probabilities: Array) -> float:
    """Return how many standard deviations chi-square lies above its mean, pooling rare tokens."""
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


def test_the_chi_square_check_detects_a_small_difference() -> None:
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
def test_greedy_settings_take_the_likeliest_token(llama: Model, settings: dict[str, Any]) -> None:
    used = random_adapter(llama, 4)
    spec = SampleSpec(prompt(), 2, max_tokens=10, topk_sample_logprobs=3, use_eos=False, **settings)
    one, two = sample(llama, spec, used).sequences
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.topk is not None
    assert one.tokens.tolist() == one.topk.token_ids[:, 0].tolist()
    assert one.logprobs.tobytes() == one.topk.logprobs[:, 0].tobytes()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    spec, random = SampleSpec(prompt(), temperature=temperature, top_p=0.9), stream(0, 0)
    for settings in ({}, {"top_p": 1.0}, {"top_k": 7}):
        assert choose(ROW, replace(spec, **settings), random) == int(ROW.argmax())


def test_equal_logits_prefer_the_lower_id() -> None:
    row = np.array([0.0, 1.0, 1.0, 1.0, -1.0], np.float32)
    spec = SampleSpec(prompt(), temperature=0)
    assert choose(row, spec, stream(0, 0)) == 1
    assert top_tokens(log_softmax(row), 4)[0].tolist() == [1, 2, 3, 0]


def test_a_seed_repeats_the_tokens_and_samples_of_a_request_differ(llama: Model) -> None:
    spec = SampleSpec(prompt(), 4, max_tokens=12, seed=5, use_eos=False)
    first, again = sample(llama, spec), sample(llama, spec)
    for one, other in zip(first.sequences, again.sequences, strict=True):
        assert one.tokens.tobytes() == other.tokens.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
    texts = {tuple(s.tokens.tolist()) for s in first.sequences}
    assert len(texts) == 4
    other_seed = sample(llama, replace(spec, seed=6))
    assert not texts & {tuple(s.tokens.tolist()) for s in other_seed.sequences}


def test_a_sample_does_not_depend_on_num_samples(llama: Model) -> None:
    spec = SampleSpec(prompt(), 5, max_tokens=12, seed=5, use_eos=False)
    five = sample(llama, spec).sequences
    two = sample(llama, replace(spec, num_samples=2)).sequences
    assert [s.tokens.tolist() for s in two] == [s.tokens.tolist() for s in five[:2]]


@pytest.mark.parametrize("seed", [0, 1, 2**53, 2**63 - 1, 2**64 - 1, -1])
def test_streams_of_adjacent_seeds_differ(seed: int) -> None:
    streams = [(seed, 0), (seed, 1), (seed, 2**63), (seed + 1, 0), (seed + 1, 2**63)]
    assert len({stream(*key).random() for key in streams}) == len(streams)
    assert stream(seed, 0).random() == stream(seed, 0).random()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.3}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.5}], ids=str
)
def test_logprobs_ignore_temperature_top_k_and_top_p(
    llama: Model, settings: dict[str, Any]
) -> None:
    spec = SampleSpec(prompt(), 3, max_tokens=5, topk_sample_logprobs=259, **settings)
    sequences = sample(llama, spec).sequences
    assert len(sequences) == 3
    for sequence in sequences:
        assert sequence.topk is not None
        assert sequence.topk.token_ids.shape == (len(sequence.tokens), 259)
        assert np.exp(sequence.topk.logprobs).sum(1) == pytest.approx(1, abs=1e-5)
        for token, logprob, ids, values in zip(
            sequence.tokens,
            sequence.logprobs,
            sequence.topk.token_ids,
            sequence.topk.logprobs,
            strict=True,
        ):
            assert logprob == values[ids.tolist().index(token)]


def test_topk_logprobs_are_the_likeliest_in_order(llama: Model) -> None:
    spec = SampleSpec(prompt(), 2, max_tokens=6, seed=1)
    few = sample(llama, replace(spec, topk_sample_logprobs=4)).sequences
    every = sample(llama, replace(spec, topk_sample_logprobs=259)).sequences
    assert sample(llama, spec).sequences[0].topk is None
    assert len(few) == len(every) == 2
    for four, whole in zip(few, every, strict=True):
        assert len(four.tokens) > 0
        assert four.topk is not None
        assert whole.topk is not None
        assert four.topk.token_ids.shape == (len(four.tokens), 4)
        assert four.topk.token_ids.tolist() == whole.topk.token_ids[:, :4].tolist()
        assert (np.diff(whole.topk.logprobs, axis=1) <= 0).all()


# Rows that are drawn together


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 40, "top_p": 0.9, "temperature": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [3, 259, 20_000])  # all rows at once, and one at a time
@pytest.mark.parametrize("decimals", [0, 7], ids=["equal logits", "distinct logits"])
def test_rows_draw_together_what_each_draws_alone(
    vocabulary: int, decimals: int, settings: dict[str, Any]
) -> None:
    rows = 9
    logits = np.random.default_rng(4).normal(0, 3, (rows, vocabulary)).round(decimals)
    logits = logits.astype(np.float32)
    spec = SampleSpec(prompt(), topk_sample_logprobs=2, **settings)
    together, alone = ([stream(8, i) for i in range(rows)] for _ in range(2))
    draws = draw(logits, spec, together)
    assert len(draws.tokens) == len(draws.logprobs) == len(draws.top) == rows
    for row in range(rows):
        token, logprobs = draws.tokens[row], log_softmax(logits[row])
        assert (
            token == choose(logits[row], spec, alone[row]) == by_definition(logits[row], spec, row)
        )
        assert draws.logprobs[row] == float(logprobs[token])
        ids = np.argsort(-logprobs, kind="stable")[:2]
        assert draws.top[row][0].tolist() == ids.tolist()
        assert draws.top[row][1].tobytes() == logprobs[ids].astype(np.float32).tobytes()
        assert together[row].random() == alone[row].random()
    shared = draw(logits[:1], spec, [stream(8, i) for i in range(rows)])
    assert shared.tokens == [choose(logits[0], spec, stream(8, i)) for i in range(rows)]


def by_definition(logits: Array, spec: SampleSpec, index: int) -> int:
    """Draw a token from ids sorted by their probability, as releases so far did."""
    if spec.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - float(logits.max())) / spec.temperature
    restricted = 0 < spec.top_k < len(scaled) or spec.top_p < 1
    order = np.argsort(-scaled, kind="stable") if restricted else np.arange(len(scaled))
    order = order[: spec.top_k] if 0 < spec.top_k < len(scaled) else order
    weights = np.exp(scaled[order])
    cumulated = np.cumsum(weights / weights.sum())
    if spec.top_p < 1:
        cumulated = cumulated[: int(np.searchsorted(cumulated, spec.top_p)) + 1]
    number = stream(8, index).random() * cumulated[-1]
    return int(order[min(int(np.searchsorted(cumulated, number, "right")), len(cumulated) - 1)])


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 50}, {"top_p": 0.7}, {"top_p": 0.9999}], ids=str
)
@pytest.mark.parametrize("vocabulary", [5000, 20_000])
def test_a_search_where_rounding_decides_takes_the_definition(
    vocabulary: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.random.default_rng(7).normal(0, 2, (40, vocabulary)).astype(np.float32)
    spec = SampleSpec(prompt(), **settings)
    found = draw(logits, spec, [stream(8, i) for i in range(40)])
    assert found.tokens == [by_definition(row, spec, i) for i, row in enumerate(logits)]
    monkeypatch.setattr(token_choice, "_MARGIN", 1.0)  # everything is near to a sum
    assert draw(logits, spec, [stream(8, i) for i in range(40)]) == found


def test_numbers_near_to_a_sum_and_the_end_of_the_sums_are_not_clear() -> None:
    sums = np.array([0.25, 0.5, 0.75])
    assert [token_choice._clear_place(sums, number) for number in (0.1, 0.3, 0.6)] == [0, 1, 2]
    for number in (0.25, 0.5 + 1e-10, 0.5 - 1e-10, 0.8):
        assert token_choice._clear_place(sums, number) is None


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9}], ids=str)
def test_a_large_vocabulary_is_neither_sorted_nor_cumulated(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def watched(function: Any) -> Any:
        def call(values: Array, *axis: int) -> Array:
            sizes.append(values.size)
            result: Array = function(values, *axis)
            return result

        return call

    monkeypatch.setattr(np, "sort", watched(np.sort))
    monkeypatch.setattr(np, "cumsum", watched(np.cumsum))
    logits = np.random.default_rng(7).normal(0, 3, (1, 50_000)).astype(np.float32)
    draw(logits, SampleSpec(prompt(), **settings), [stream(8, 0)])
    assert 0 < max(sizes) < 50_000 / 4


def test_the_drawn_tokens_from_a_position_on_are_the_end_of_all(llama: Model) -> None:
    batch = SamplingBatch(llama)
    spec = SampleSpec(prompt(), 3, max_tokens=20, seed=1, topk_sample_logprobs=2, use_eos=False)
    batch.add("it", spec, None)
    for _ in range(6):
        batch.step()
    every = batch.drawn("it", 0)
    assert [each.position for each in every] == list(range(6))
    for position in range(8):
        assert batch.drawn("it", position) == every[position:]


# Failures and cancellation


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


def test_an_error_while_drawing_ends_one_request_alone(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = SamplingBatch(llama)
    spec = SampleSpec(prompt(), 2, max_tokens=6, seed=1)
    batch.add("good", spec, None)
    batch.add("bad", spec, None)
    batch.step()
    batch.step()
    batch.step()
    request = batch._active["bad"]
    draw = request.draw
    monkeypatch.setattr(request, "draw", lambda logits: draw(np.full_like(logits, np.nan)))
    ended: dict[str, Any] = {}
    while batch.busy:
        ended.update(batch.step())
    assert isinstance(ended["bad"], InputError)
    alone = sample(llama, spec)
    for one, other in zip(ended["good"].sequences, alone.sequences, strict=True):
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_a_cancelled_request_never_finishes(llama: Model) -> None:
    batch = SamplingBatch(llama)
    for key in "abc":
        batch.add(key, SampleSpec(prompt(), max_tokens=50, use_eos=False), None)
    batch.step()
    batch.cancel("a")
    batch.cancel("c")
    batch.cancel("unknown")
    ended = []
    while batch.busy:
        ended += batch.step()
    assert [key for key, _ in ended] == ["b"]


def test_number_at_the_end_of_a_block_is_searched_by_the_definition() -> None:
    weights = np.random.default_rng(4).random(151_936)
    total = weights.sum()
    cumulated = np.cumsum(weights / total)
    block = token_choice._BLOCK
    ends = [float(cumulated[end - 1]) for end in range(block, len(weights) - block, block)]
    near = (-1e-14, -1e-15, -1e-16, 0.0, 1e-16, 1e-15, 1e-14)
    numbers = [end * (1 + distance) for end in ends for distance in near]
    assert len(numbers) > 7000
    found = [token_choice._search(weights, number, total) for number in numbers]
    assert found == token_choice._search_all((weights / total)[None], np.array(numbers))
