"""P5 in sampling: a request's tokens and logprobs have the same bits alone and among others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from everstep.engine import Model, SampleSpec
from everstep.engine.run_state import Adapter
from tests.engine.helpers import random_adapter, sample_all


def test_a_request_has_the_same_bits_alone_and_among_others(model: Model) -> None:
    first, second = random_adapter(model, 1), random_adapter(model, 2)
    random = np.random.default_rng(5)
    requests: list[tuple[SampleSpec, Adapter | None]] = []
    for index in range(9):
        spec = SampleSpec(
            random.integers(0, 256, int(random.integers(2, 40))),
            num_samples=int(random.integers(1, 6)),
            max_tokens=int(random.integers(6, 15)),
            temperature=0.9,
            seed=index,
        )
        requests.append((spec, (None, first, second)[index % 3]))
    together = sample_all(model, requests)
    for request, among in zip(requests, together, strict=True):
        (alone,) = sample_all(model, [request])
        assert alone.sequences
        for one, other in zip(alone.sequences, among.sequences, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_requests_share_passes_and_each_position_is_computed_once(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[tuple[int, ...]] = []
    decoded: list[int] = []
    hidden, logits = llama.hidden, llama.decoder.logits

    def watched_prompts(tokens: Any, **kwargs: Any) -> Any:
        prompts.append(tuple(tokens.shape))
        return hidden(tokens, **kwargs)

    def watched_passes(tokens: Any, *arguments: Any) -> Any:
        decoded.append(len(tokens))
        return logits(tokens, *arguments)

    monkeypatch.setattr(llama, "hidden", watched_prompts)
    monkeypatch.setattr(llama.decoder, "logits", watched_passes)
    used = random_adapter(llama, 1)
    asked = [(5, 2), (9, 3), (7, 1)]
    requests: list[tuple[SampleSpec, Adapter | None]] = [
        (SampleSpec(np.arange(1, 1 + length), samples, max_tokens=20, use_eos=False), used)
        for length, samples in asked
    ]
    sample_all(llama, requests)
    assert prompts == [(1, length) for length, _ in asked], "each once, for all of its samples"
    assert 19 <= len(decoded) <= 19 + 2 * len(asked), "a token of all of them a pass"
