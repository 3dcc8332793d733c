"""P5 in sampling: a request's tokens and logprobs have the same bits alone and among others."""

from __future__ import annotations

import numpy as np
import torch

from everstep.engine import AdapterConfig, Model, SampleSpec, SamplingBatch
from everstep.engine.state import Adapter
from everstep.wire.proto import SampleOutput


def adapters(model: Model) -> list[Adapter]:
    made = []
    for seed in (1, 2):
        state = model.new_run(AdapterConfig(rank=4, seed=seed))
        noise = torch.Generator().manual_seed(seed)
        state.arena.buffers["params"].normal_(0, 0.05, generator=noise)
        capture = state.capture(optimizer=False)
        content = b"".join(bytes(c) for c in capture.files()["adapter_model.safetensors"])
        capture.release()
        made.append(model.load_adapter(state.layout.config, content))
    return made


def sample(model: Model, requests: list[tuple[SampleSpec, Adapter | None]]) -> list[SampleOutput]:
    batch = SamplingBatch(model)
    finished = []
    for index, (spec, adapter) in enumerate(requests):
        batch.add(str(index), spec, adapter)
        finished += batch.step()  # they come one after another
    while batch.busy:
        finished += batch.step()
    found = dict(finished)
    outputs = []
    for index in range(len(requests)):
        outcome = found[str(index)]
        assert isinstance(outcome, SampleOutput), outcome
        outputs.append(outcome)
    return outputs


def test_a_request_has_the_same_bits_alone_and_among_others(model: Model) -> None:
    first, second = adapters(model)
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
    together = sample(model, requests)
    for request, among in zip(requests, together, strict=True):
        (alone,) = sample(model, [request])
        for one, other in zip(alone.sequences, among.sequences, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_stop_tokens_and_strings_end_a_sequence_and_belong_to_it(model: Model) -> None:
    spec = SampleSpec(np.array([1, 2, 3]), num_samples=4, max_tokens=200, seed=3, temperature=1.5)
    (free,) = sample(model, [(spec, None)])
    token = int(free.sequences[0].tokens[4])
    stopped = SampleSpec(
        spec.tokens, num_samples=4, max_tokens=200, seed=3, temperature=1.5, stop_tokens=(token,)
    )
    (output,) = sample(model, [(stopped, None)])
    sequence = output.sequences[0]
    assert sequence.stop_reason == "stop"
    assert sequence.tokens[-1] == token
    assert sequence.tokens.tolist() == free.sequences[0].tokens[: len(sequence.tokens)].tolist()
