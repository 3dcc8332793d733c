"""Helpers of the engine's tests: datums, training steps, complete samples."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from everstep.engine import (
    AdamParams,
    AdapterConfig,
    Model,
    PassResult,
    RunState,
    SampleSpec,
    SamplingBatch,
    forward_backward,
    optim_step,
)
from everstep.engine.run_state import Adapter
from everstep.engine.sampling.validation import check_sample
from everstep.wire.codecs.proto import SampleOutput
from everstep.wire.messages.passes import Example

CONFIG = AdapterConfig(rank=4, seed=3)
BYTES = 256
"""Ids below this number are in every tiny model's vocabulary."""


def finish(steps: Generator[None, None, Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def examples(seed: int = 0, lengths: tuple[int, ...] = (9, 17, 5)) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(
            random.integers(0, BYTES, length),
            {
                "target_tokens": random.integers(0, BYTES, length),
                "weights": random.random(length).astype(np.float32),
            },
        )
        for length in lengths
    ]


def forward(model: Model, state: RunState, data: Sequence[Example]) -> PassResult:
    return _cross_entropy(model, state, data, backward=False)


def backward(model: Model, state: RunState, data: Sequence[Example]) -> PassResult:
    return _cross_entropy(model, state, data, backward=True)


def _cross_entropy(
    model: Model, state: RunState, data: Sequence[Example], *, backward: bool
) -> PassResult:
    steps = forward_backward(model, state, data, "cross_entropy", {}, backward=backward)
    result: PassResult = finish(steps)
    assert data and len(result.outputs) == len(data)
    return result


def buffers(state: RunState) -> dict[str, bytes]:
    """Return all buffers of a run as bytes."""
    return {name: buffer.cpu().numpy().tobytes() for name, buffer in state.arena.buffers.items()}


def trained(model: Model, seed: int = 3, steps: int = 2, rate: float = 0.01) -> RunState:
    """Train a run for a few steps, so that its B is not zero."""
    state = model.new_run(AdapterConfig(rank=4, seed=seed))
    for step in range(steps):
        backward(model, state, examples(1000 * seed + step))
        optim_step(state, AdamParams(learning_rate=rate))
    return state


def files(
    state: RunState, *, optimizer: bool, zero_moments: bool = True
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return a checkpoint's files and metadata."""
    capture = state.capture(optimizer=optimizer, zero_moments=zero_moments)
    content = {n: b"".join(bytes(c) for c in chunks) for n, chunks in capture.files().items()}
    capture.release()
    return content, capture.meta


def adapter(model: Model, state: RunState) -> Adapter:
    content, _ = files(state, optimizer=False)
    return model.load_adapter(state.layout.config, content["adapter_model.safetensors"])


def random_adapter(model: Model, seed: int, size: float = 0.05) -> Adapter:
    """Create an adapter that changes every logit."""
    state = model.new_run(AdapterConfig(rank=4, seed=seed))
    noise = torch.Generator().manual_seed(seed)
    values = torch.empty(state.arena.size).normal_(0, size, generator=noise)
    state.arena.buffers["params"].copy_(values)
    return adapter(model, state)


def sample_all(
    model: Model, requests: Sequence[tuple[SampleSpec, Adapter | None]]
) -> list[SampleOutput]:
    """Sample requests that arrive one after another, each while the earlier ones continue."""
    batch = SamplingBatch(model)
    finished = []
    for index, (spec, used) in enumerate(requests):
        check_sample(
            spec,
            vocab_size=model.info.vocab_size,
            max_context_length=model.info.max_context_length,
        )
        batch.add(str(index), spec, used)
        finished += batch.step()
    while batch.busy:
        finished += batch.step()
    found = dict(finished)
    outputs = []
    for index in range(len(requests)):
        outcome = found[str(index)]
        assert isinstance(outcome, SampleOutput), outcome
        check_sequences(outcome, requests[index][0])
        outputs.append(outcome)
    return outputs


def check_sequences(output: SampleOutput, spec: SampleSpec) -> None:
    """Check that an output holds every sequence, so that a loop over them checks something."""
    assert len(output.sequences) == spec.num_samples > 0
    for sequence in output.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs)
        assert len(sequence.tokens) > 0 or spec.max_tokens == 0


def sample(model: Model, spec: SampleSpec, used: Adapter | None = None) -> SampleOutput:
    return sample_all(model, [(spec, used)])[0]


def prompt(*tokens: int) -> np.ndarray[Any, Any]:
    return np.array(tokens or (1, 2, 3), dtype=np.int64)


class OperationCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that compute, and the bytes of the largest result.

    Attributes:
        calls: number of operations, views left out.
        largest: bytes of the largest result.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.calls += 1
            self.largest = max(self.largest, result.nbytes)
        return result
