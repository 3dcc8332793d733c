"""P5 in sampling: a request's tokens and logprobs have the same bits alone and among others."""

from __future__ import annotations

import numpy as np

from everstep.engine import Model, SampleSpec
from everstep.engine.state import Adapter
from tests.engine.helpers import random_adapter, sample_all


def test_a_request_has_the_same_bits_alone_and_among_others(model: Model) -> None:
    first, second = random_adapter(model, 1), random_adapter(model, 2)
    random = np.random.default_rng(5)
    requests: list[tuple[SampleSpec, Adapter | None]] = []
    for index in range(12):
        spec = SampleSpec(
            random.integers(0, 256, int(random.integers(2, 40))),
            num_samples=int(random.integers(1, 6)),
            max_tokens=int(random.integers(6, 25)),
            temperature=0.9,
            seed=index,
        )
        requests.append((spec, (None, first, second)[index % 3]))
    together = sample_all(model, requests)
    for request, among in zip(requests, together, strict=True):
        (alone,) = sample_all(model, [request])
        for one, other in zip(alone.sequences, among.sequences, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()
