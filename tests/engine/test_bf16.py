"""bfloat16 base weights: the promises of exactness hold, and only the distance to PEFT grows.

`docs/numerics.md` states these tolerances.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.engine import (
    AdamParams,
    AdapterConfig,
    Model,
    SampleSpec,
    load_model,
    optim_step,
)
from everstep.engine.models.lora import AdapterBinding, BoundAdapter, LoraProjection
from everstep.engine.run_state import Adapter
from tests.engine.helpers import (
    adapter,
    backward,
    buffers,
    examples,
    files,
    forward,
    random_adapter,
    sample,
    sample_all,
    trained,
)
from tests.engine.test_reference import distance, export, reference, reference_loss, trainable

LOSS = 1e-3
"""Relative difference to PEFT's summed loss."""
GRADIENTS = 3e-2
"""Norm of the difference to PEFT's gradients, relative to their norm."""
LOGPROBS = 3e-2
"""Difference of a prompt's logprobs to the trainer's, from rounding logits to bfloat16."""
STEP = AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=1.0)


@pytest.fixture(scope="module", params=["llama", "qwen3-tied", "gpt2", "gemma3"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def half(name: str, directories: dict[str, Path]) -> Model:
    return load_model(name, str(directories[name]), device="cpu", dtype="bfloat16")


def test_base_weights_are_bfloat16_and_runs_are_float32(half: Model) -> None:
    state = trained(half)
    assert half.info.dtype == "bfloat16"
    projections = [p for p in half.module.parameters() if p.ndim > 1]
    assert {p.dtype for p in projections} == {torch.bfloat16}
    assert {buffer.dtype for buffer in state.arena.buffers.values()} == {torch.float32}
    assert state.arena.buffers["exp_avg"].norm() > 0
    (output,) = forward(half, state, examples(1, (9,))).outputs
    assert output["logprobs"].dtype == np.float32


def test_the_low_rank_product_is_computed_in_float32() -> None:
    random = torch.Generator().manual_seed(1)
    base = torch.nn.Linear(16, 24, bias=False, dtype=torch.bfloat16)
    base.weight.data.zero_()
    x = torch.randn(16, 16, generator=random).bfloat16()
    a, b = torch.randn(4, 16, generator=random), torch.randn(24, 4, generator=random)
    binding = AdapterBinding()
    projection = LoraProjection(base, "p", binding)
    with torch.no_grad(), binding.bind(BoundAdapter({"p": (a, b)}, 0.37)):
        found = projection(x)
    assert torch.equal(found, ((x.float() @ a.T @ b.T) * 0.37).bfloat16())


def test_a_sample_has_the_same_bits_alone_and_among_others(half: Model) -> None:
    used: list[Adapter | None] = [None, random_adapter(half, 1), random_adapter(half, 2)]
    random = np.random.default_rng(5)
    requests = [
        (
            SampleSpec(
                random.integers(0, 256, int(random.integers(2, 30))),
                int(random.integers(1, 6)),
                max_tokens=int(random.integers(5, 12)),
                seed=index,
            ),
            used[index % 3],
        )
        for index in range(6)
    ]
    for request, among in zip(requests, sample_all(half, requests), strict=True):
        alone = sample(half, *request)
        assert alone.sequences
        for one, other in zip(alone.sequences, among.sequences, strict=True):
            assert one.tokens.tobytes() == other.tokens.tobytes()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_interleaved_runs_equal_each_run_alone(half: Model) -> None:
    def step(index: int, number: int) -> None:
        backward(half, states[index], examples(10 * index + number))
        optim_step(states[index], STEP)

    configs = [AdapterConfig(4, seed=1), AdapterConfig(8, seed=2)]
    states = [half.new_run(config) for config in configs]
    for index in range(2):
        for number in range(3):
            step(index, number)
    alone = [buffers(state) for state in states]
    states = [half.new_run(config) for config in configs]
    for number in range(3):
        for index in range(2):
            step(index, number)
        sample(half, SampleSpec(np.arange(1, 4), 3, max_tokens=3), adapter(half, states[0]))
    assert [buffers(state) for state in states] == alone


@pytest.mark.parametrize("pending", [False, True])
def test_a_restored_run_continues_with_the_same_bits(half: Model, pending: bool) -> None:
    state = trained(half)
    if pending:
        backward(half, state, examples(1))
    contents, meta = files(state, optimizer=True)
    restored = half.new_run(AdapterConfig(rank=4, seed=99))
    restored.restore(contents, meta, optimizer=True)
    for each in (state, restored):
        for number in range(3):
            backward(half, each, examples(number))
            optim_step(each, STEP)
    assert buffers(restored) == buffers(state)
    assert restored.step == state.step
    one, other = (forward(half, each, examples(7)) for each in (state, restored))
    assert one.metrics == other.metrics
    for mine, theirs in zip(one.outputs, other.outputs, strict=True):
        assert mine["logprobs"].tobytes() == theirs["logprobs"].tobytes()


def test_losses_and_gradients_are_near_pefts(
    name: str, half: Model, directories: dict[str, Path], tmp_path: Path
) -> None:
    state = trained(half)
    module = reference(name, directories, export(state, tmp_path / "adapter"), torch.bfloat16)
    parameters = trainable(module)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    loss = reference_loss(module, examples(9))
    loss.backward()  # type: ignore[no-untyped-call]
    result = backward(half, state, examples(9))
    assert result.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=LOSS)
    theirs = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    assert len(theirs) == len(parameters)
    assert distance(state.arena.views("grads"), theirs) < GRADIENTS


def test_prompts_score_near_the_trainers_forward(half: Model) -> None:
    state = trained(half)
    (example,) = examples(3, (40,))
    spec = SampleSpec(example.tokens, max_tokens=0, prompt_logprobs=True)
    found = sample(half, spec, adapter(half, state)).prompt_logprobs
    example.inputs["target_tokens"][:-1] = example.tokens[1:]
    (output,) = forward(half, state, [example]).outputs
    assert found is not None
    np.testing.assert_allclose(found[1:], output["logprobs"][:-1], atol=LOGPROBS)
