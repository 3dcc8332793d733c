"""Prompt scores: compared with the trainer's forward over the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from everstep.engine import Model, RunState, SampleSpec
from everstep.wire.messages.outputs import NO_TOPK
from everstep.wire.messages.passes import Example
from tests.engine.helpers import adapter, forward, prompt, sample, trained

Array = np.ndarray[Any, Any]
TOLERANCE = 5e-6
"""The trainer's rows share a matrix product, while a prompt's are computed one by one."""
TOKENS = np.random.default_rng(4).integers(0, 256, 23)
SPEC = SampleSpec(TOKENS, max_tokens=0)


def rows(model: Model, state: RunState) -> Array:
    """Compute the logprobs that predict positions 1 and up, [P - 1, V]."""
    with torch.no_grad(), model.bind_weights(state.layout, state.leaves()):
        hidden = model.hidden(torch.from_numpy(TOKENS).unsqueeze(0))
        logprobs: Array = torch.log_softmax(model.logits(hidden)[0, :-1], -1).numpy()
        return logprobs


def test_prompt_logprobs_equal_the_trainers_forward(model: Model) -> None:
    state = trained(model, rate=0.05)
    scored = sample(model, replace(SPEC, prompt_logprobs=True), adapter(model, state))
    datum = Example(TOKENS[:-1], {"target_tokens": TOKENS[1:]})
    (output,) = forward(model, state, [datum]).outputs
    found = scored.prompt_logprobs
    assert found is not None
    assert found.shape == TOKENS.shape
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], output["logprobs"], atol=TOLERANCE)
    base = sample(model, replace(SPEC, prompt_logprobs=True)).prompt_logprobs
    assert base is not None
    assert np.abs(base[1:] - found[1:]).max() > 0.01, "the adapter counts"


def test_prompt_logprobs_last_n_scores_only_the_last_n(llama: Model) -> None:
    spec = replace(SPEC, prompt_logprobs=True, topk_prompt_logprobs=2)
    whole, last = sample(llama, spec), sample(llama, replace(spec, prompt_logprobs_last_n=5))
    assert whole.prompt_logprobs is not None
    assert last.prompt_logprobs is not None
    assert last.prompt_logprobs[-5:].tobytes() == whole.prompt_logprobs[-5:].tobytes()
    assert np.isnan(last.prompt_logprobs[:-5]).all()
    assert last.topk_prompt is not None
    assert (last.topk_prompt.logprobs[:-5] == NO_TOPK).all()


def test_topk_prompt_holds_the_likeliest_tokens_of_each_position(llama: Model) -> None:
    state = trained(llama)
    top = sample(llama, replace(SPEC, topk_prompt_logprobs=6), adapter(llama, state)).topk_prompt
    assert top is not None
    assert top.token_ids.shape == top.logprobs.shape == (len(TOKENS), 6)
    assert top.token_ids[0].tolist() == [0] * 6
    assert top.logprobs[0].tolist() == [NO_TOPK] * 6
    expected = np.sort(rows(llama, state), axis=1)[:, ::-1][:, :6]
    np.testing.assert_allclose(top.logprobs[1:], expected, atol=TOLERANCE)
    scores = np.take_along_axis(rows(llama, state), top.token_ids[1:].astype(np.int64), 1)
    np.testing.assert_allclose(scores, expected, atol=TOLERANCE)


def test_targets_are_scored_at_their_positions(llama: Model) -> None:
    state = trained(llama)
    targets = np.random.default_rng(1).integers(-1, 259, (len(TOKENS) - 1, 3))
    targets[4] = -1
    targets[5, 0] = 0
    spec = replace(SPEC, target_prompt_logprobs=targets)
    found = sample(llama, spec, adapter(llama, state)).target_prompt_logprobs
    assert found is not None
    expected = np.take_along_axis(rows(llama, state), np.maximum(targets, 0), 1)
    np.testing.assert_allclose(found, np.where(targets < 0, 0, expected), atol=TOLERANCE)
    assert (found[targets < 0] == 0).all()


def test_alternatives_are_drawn_at_each_position_by_the_seed(llama: Model) -> None:
    state = trained(llama)
    used = adapter(llama, state)
    spec = replace(SPEC, prompt_alt_tokens_k=4, seed=2**60)
    found = sample(llama, spec, used).prompt_alt
    assert found is not None
    assert found.token_ids.shape == found.logprobs.shape == (len(TOKENS) - 1, 4)
    scores = np.take_along_axis(rows(llama, state), found.token_ids.astype(np.int64), 1)
    np.testing.assert_allclose(found.logprobs, scores, atol=TOLERANCE)
    again, other = (
        sample(llama, replace(spec, seed=s), used).prompt_alt for s in (2**60, 2**60 + 1)
    )
    assert again is not None
    assert other is not None
    assert again.token_ids.tolist() == found.token_ids.tolist()
    assert other.token_ids.tolist() != found.token_ids.tolist()
    greedy = sample(llama, replace(spec, temperature=0), used).prompt_alt
    assert greedy is not None
    assert (greedy.token_ids == rows(llama, state).argmax(1)[:, None]).all()


@pytest.mark.parametrize("asked", [{}, {"prompt_logprobs": True}, {"topk_prompt_logprobs": 3}])
def test_scoring_a_prompt_does_not_change_the_samples(llama: Model, asked: dict[str, Any]) -> None:
    spec = SampleSpec(TOKENS, 2, max_tokens=8, seed=9, use_eos=False)
    plain, scored = sample(llama, spec), sample(llama, replace(spec, **asked))
    for one, other in zip(plain.sequences, scored.sequences, strict=True):
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
    assert (scored.prompt_logprobs is not None) == ("prompt_logprobs" in asked)
    assert (scored.topk_prompt is not None) == ("topk_prompt_logprobs" in asked)
    assert scored.prompt_alt is None
    assert scored.target_prompt_logprobs is None


def test_a_prompt_of_one_token_has_nothing_to_score(llama: Model) -> None:
    spec = SampleSpec(
        prompt(7),
        max_tokens=2,
        prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_alt_tokens_k=2,
        target_prompt_logprobs=np.zeros((0, 3), np.int64),
    )
    output = sample(llama, spec)
    assert output.prompt_logprobs is not None
    assert np.isnan(output.prompt_logprobs).tolist() == [True]
    assert output.topk_prompt is not None
    assert output.topk_prompt.token_ids.shape == (1, 2)
    assert output.prompt_alt is not None
    assert output.prompt_alt.token_ids.shape == (0, 2)
    assert output.target_prompt_logprobs is not None
    assert output.target_prompt_logprobs.shape == (0, 3)
