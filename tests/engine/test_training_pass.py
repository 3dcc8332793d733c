"""Training pass: atomic for its run, and bit for bit independent of other runs."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine import (
    AdamParams,
    AdapterConfig,
    Model,
    RunState,
    SampleSpec,
    SamplingBatch,
    forward_backward,
    numerics,
    optim_step,
)
from everstep.engine.errors import InputError
from everstep.engine.kernels.packing import Packing
from everstep.engine.losses import builtin
from everstep.engine.training_pass import MAX_PADDING, micro_batches
from everstep.wire.codecs.proto import SampleOutput
from everstep.wire.messages.passes import Example
from tests.engine.helpers import (
    adapter,
    backward,
    buffers,
    examples,
    files,
    finish,
    forward,
    prompt,
    sample,
    trained,
)
from tests.profiles import example_count

STEP = AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=1.0)
MANY = (40, 4, 30, 11, 60, 7)  # several micro-batches, with the bound below


@pytest.fixture(autouse=True)
def _small_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "TOKENS_PER_MICRO_BATCH", 64)
    assert len(micro_batches(MANY, numerics.TOKENS_PER_MICRO_BATCH)) > 2


def policy(example: Example, logprob: float, advantage: float) -> Example:
    length = len(example.tokens)
    return Example(
        example.tokens,
        {
            "target_tokens": example.inputs["target_tokens"],
            "logprobs": np.full(length, logprob, np.float32),
            "advantages": np.full(length, advantage, np.float32),
        },
    )


def steps(model: Model, state: RunState, seed: int, count: int = 2) -> Generator[None, None, None]:
    """Train a run, yielding between micro-batches so that other runs can interleave."""
    for step in range(count):
        data = examples(seed + step, MANY)
        yield from forward_backward(model, state, data, "cross_entropy", {}, backward=True)
        optim_step(state, STEP)
        yield


# A pass that fails


@pytest.mark.parametrize("waiting", [False, True])
def test_a_failed_pass_leaves_the_run_unchanged(
    llama: Model, monkeypatch: pytest.MonkeyPatch, waiting: bool
) -> None:
    state = trained(llama)
    if waiting:
        backward(llama, state, examples(1))
    before = buffers(state)
    calls = 0

    def fails_late(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == len(MANY):
            raise RuntimeError("out of memory")
        return cross_entropy(*args)

    cross_entropy = builtin.cross_entropy
    monkeypatch.setattr(builtin, "cross_entropy", fails_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        backward(llama, state, examples(2, MANY))
    assert buffers(state) == before
    assert state.has_gradients is waiting
    assert not llama.binding.adapters, "nothing stays bound"


@pytest.mark.parametrize(
    ("loss_fn", "logprob", "advantage", "words"),
    [
        ("importance_sampling", -200.0, -1.0, "The loss is inf"),
        ("dro", 1e30, 1.0, "The loss is"),
        ("ppo", -200.0, -1.0, "The loss is inf"),
        ("gspo", -200.0, -1.0, "The loss is inf"),
    ],
)
def test_an_overflow_is_reported_and_leaves_no_gradient(
    llama: Model, loss_fn: str, logprob: float, advantage: float, words: str
) -> None:
    state = trained(llama)
    before = buffers(state)
    data = [policy(example, logprob, advantage) for example in examples(1)]
    if loss_fn == "gspo":
        for example in data:
            assert isinstance(example.inputs, dict)
            example.inputs["sequence_ratio_mask"] = np.ones(len(example.tokens), np.float32)
    with pytest.raises(InputError, match=words):
        finish(forward_backward(llama, state, data, loss_fn, {}, backward=True))
    assert buffers(state) == before
    assert not state.has_gradients


def test_an_abandoned_pass_leaves_no_gradient(llama: Model) -> None:
    state = trained(llama)
    before = buffers(state)
    steps = forward_backward(llama, state, examples(2, MANY), "cross_entropy", {}, backward=True)
    next(steps)
    next(steps)
    steps.close()
    assert buffers(state) == before


def test_a_failed_restore_leaves_the_run_unchanged(llama: Model) -> None:
    good, meta = files(trained(llama, seed=5), optimizer=True)
    state = trained(llama, seed=6)
    before = buffers(state), state.step
    bad: list[tuple[dict[str, bytes], dict[str, Any]]] = [
        ({n: c for n, c in good.items() if not n.startswith("adapter_model")}, meta),
        ({n: c for n, c in good.items() if not n.startswith("optimizer")}, meta),
        ({**good, "optimizer.safetensors": good["adapter_model.safetensors"]}, meta),
        ({**good, "adapter_model.safetensors": b"\x08" + good["adapter_model.safetensors"]}, meta),
        ({**good, "adapter_model.safetensors": good["adapter_model.safetensors"][:-4]}, meta),
        ({**good, "gradients.safetensors": b""}, meta),
        (good, {}),
    ]
    for contents, bad_meta in bad:
        with pytest.raises((InputError, KeyError)):
            state.restore(contents, bad_meta, optimizer=True)
        assert (buffers(state), state.step) == before


# Independence of other datums and runs


def test_gradients_of_several_passes_add_up_to_those_of_one(llama: Model) -> None:
    data = examples(4, MANY)
    once, twice = trained(llama), trained(llama)
    whole = backward(llama, once, data)
    parts = [backward(llama, twice, data[:2]), backward(llama, twice, data[2:])]
    assert whole.metrics["loss:sum"] == pytest.approx(
        sum(part.metrics["loss:sum"] for part in parts), rel=1e-6
    )
    expected = once.arena.buffers["grads"]
    assert expected.norm() > 1
    assert (twice.arena.buffers["grads"] - expected).norm() < 1e-6 * expected.norm()


def test_a_datum_scores_the_same_alone_and_in_a_batch_up_to_rounding(llama: Model) -> None:
    state = trained(llama)
    data = examples(3, (11, 12, 11, 10, 11, 60, 2))
    together = forward(llama, state, data)
    for example, output in zip(data, together.outputs, strict=True):
        (alone,) = forward(llama, state, [example]).outputs
        np.testing.assert_allclose(alone["logprobs"], output["logprobs"], atol=3e-6)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
@example_count(60)
def test_micro_batches_hold_every_datum_once_with_little_padding(lengths: list[int]) -> None:
    groups = micro_batches(lengths, numerics.TOKENS_PER_MICRO_BATCH)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[index] for index in group]
        assert len(group) == 1 or sum(sizes) <= numerics.TOKENS_PER_MICRO_BATCH
        packing = Packing(sizes, MAX_PADDING, torch.device("cpu"))
        assert sum(part.size for part in packing.groups) == sum(sizes)
        for part in packing.groups:
            assert part.count * part.width <= MAX_PADDING * part.size


def test_interleaved_runs_equal_each_run_alone_bit_for_bit(llama: Model) -> None:
    configs = [AdapterConfig(4, seed=1), AdapterConfig(8, seed=2), AdapterConfig(4, seed=1)]
    alone = []
    for index, config in enumerate(configs):
        state = llama.new_run(config)
        finish(steps(llama, state, seed=10 * index))
        alone.append(buffers(state))
    assert alone[0] != alone[2], "they see different data"

    states = [llama.new_run(config) for config in configs]
    sampler = adapter(llama, trained(llama, seed=8))
    batch = SamplingBatch(llama)
    turns = [steps(llama, state, seed=10 * i) for i, state in enumerate(states)]
    count = 0
    while turns:
        for turn in list(turns):
            try:
                next(turn)
            except StopIteration:
                turns.remove(turn)
            if not batch.busy:
                count += 1
                batch.add(str(count), SampleSpec(prompt(), 3, max_tokens=5), sampler)
            batch.step()
    assert count > 3, "sampling went on between the passes"
    assert [buffers(state) for state in states] == alone
    assert {state.step for state in states} == {2}


def test_training_does_not_change_other_runs_or_the_base(llama: Model) -> None:
    other = trained(llama, seed=1)
    backward(llama, other, examples(5))
    before = buffers(other), other.step, other.has_gradients
    base = {name: tensor.clone() for name, tensor in llama.module.state_dict().items()}
    state = llama.new_run(AdapterConfig(rank=4, seed=1))
    for step in range(3):
        backward(llama, state, examples(step))
        optim_step(state, AdamParams(learning_rate=0.1, weight_decay=0.5))
    assert (buffers(other), other.step, other.has_gradients) == before
    assert base
    for name, tensor in llama.module.state_dict().items():
        assert torch.equal(tensor, base[name]), name
        assert tensor.grad is None


def test_sampling_from_a_checkpoint_ignores_later_steps(llama: Model) -> None:
    state = trained(llama, rate=0.05)
    backward(llama, state, examples(3))
    checkpoint = adapter(llama, state)
    spec = SampleSpec(prompt(), 2, max_tokens=12, prompt_logprobs=True, seed=4)
    before = buffers(state)
    first = sample(llama, spec, checkpoint)
    assert buffers(state) == before
    assert state.has_gradients
    optim_step(state, AdamParams(learning_rate=0.5))
    second = sample(llama, spec, checkpoint)
    moved = sample(llama, spec, adapter(llama, state))

    def logprobs(output: SampleOutput) -> bytes:
        return b"".join(s.logprobs.tobytes() for s in output.sequences)

    assert logprobs(second) == logprobs(first), "the run's step did not reach the checkpoint"
    assert logprobs(moved) != logprobs(first)


def test_a_step_without_gradients_uses_zeros(llama: Model) -> None:
    state = trained(llama)
    weights = state.arena.buffers["params"].clone()
    moments = state.arena.buffers["exp_avg"].clone()
    metrics = optim_step(state, AdamParams(learning_rate=0.0))
    assert metrics == {"optimizer_step": 3.0, "grad_norm": 0.0}
    assert torch.equal(state.arena.buffers["params"], weights)
    assert torch.allclose(state.arena.buffers["exp_avg"], 0.9 * moments)
