"""Divergence: steps that would make it, states and adapters that hold it, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.adamw import adamw

from everstep.engine import AdamParams, Model, RunState, SamplingBatch, optim_step
from everstep.engine.divergence import UNKNOWN, Magnitudes, is_finite
from everstep.engine.errors import Diverged, InputError
from everstep.engine.run_state import Adapter
from everstep.engine.sampling.prompt_logprobs import score_prompt
from everstep.engine.sampling.spec import SampleSpec
from tests.engine.helpers import (
    CONFIG,
    adapter,
    backward,
    buffers,
    examples,
    files,
    forward,
    prompt,
    trained,
)

SOUND = AdamParams(learning_rate=1e-2)


def with_gradients(model: Model, value: float | None = None) -> RunState:
    """A trained run whose next step has gradients: of a pass, or all of one value."""
    state = trained(model)
    backward(model, state, examples(7))
    if value is not None:
        state.arena.buffers["grads"].fill_(value)
    return state


def restored(model: Model, buffer: str, value: float) -> RunState:
    """A run that was restored from a checkpoint with one bad number."""
    state = trained(model)
    state.arena.buffers[buffer][3] = value
    contents, meta = files(state, optimizer=True)
    other = model.new_run(CONFIG)
    other.restore(contents, meta, optimizer=True)
    return other


def everything(state: RunState) -> tuple[Any, ...]:
    return buffers(state), state.step, state.has_gradients


# Healthy steps


@pytest.mark.parametrize(
    "params",
    [
        SOUND,
        replace(SOUND, grad_clip_norm=0.5, weight_decay=0.1),
        AdamParams(1.0, 0.0, 0.999, 1e-8, 0.3),
        replace(SOUND, eps=0.0),  # its bound is not known: copies are stepped
        replace(SOUND, learning_rate=1e30),
    ],
    ids=str,
)
def test_a_finite_step_has_the_bits_of_an_unguarded_one(llama: Model, params: AdamParams) -> None:
    state = llama.new_run(CONFIG)
    plain = {name: buffer.clone() for name, buffer in state.arena.buffers.items()}
    random = torch.Generator().manual_seed(1)
    for step in range(4):
        state.arena.buffers["grads"].normal_(0, 0.1**step, generator=random)
        plain["grads"].copy_(state.arena.buffers["grads"])
        norm = torch.linalg.vector_norm(plain["grads"])
        if params.grad_clip_norm:
            plain["grads"].mul_(torch.clamp(params.grad_clip_norm / (norm + 1e-6), max=1.0))
        adamw(
            [plain["params"]],
            [plain["grads"]],
            [plain["exp_avg"]],
            [plain["exp_avg_sq"]],
            [],
            [torch.tensor(float(step))],
            fused=True,
            amsgrad=False,
            beta1=params.beta1,
            beta2=params.beta2,
            lr=params.learning_rate,
            weight_decay=params.weight_decay,
            eps=params.eps,
            maximize=False,
        )
        assert optim_step(state, params)["grad_norm"] == float(norm)
        plain["grads"].zero_()
        assert buffers(state) == {name: each.numpy().tobytes() for name, each in plain.items()}


def test_a_healthy_step_measures_and_copies_nothing(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = with_gradients(llama)
    monkeypatch.setattr(Magnitudes, "measure", lambda _: pytest.fail("the state was measured"))
    where = {name: buffer.data_ptr() for name, buffer in state.arena.buffers.items()}
    for _ in range(50):
        state.arena.buffers["grads"].normal_(0, 10)
        optim_step(state, SOUND)
    assert {name: buffer.data_ptr() for name, buffer in state.arena.buffers.items()} == where


def test_bounds_hold_after_every_step(llama: Model) -> None:
    state = llama.new_run(CONFIG)
    random = np.random.default_rng(1)
    for _ in range(200):
        state.arena.buffers["grads"].normal_(0, float(10 ** random.uniform(-20, 8)))
        params = AdamParams(
            learning_rate=10 ** random.uniform(-6, 3),
            beta1=random.uniform(0, 0.99),
            beta2=random.uniform(0, 0.9999),
            eps=10 ** random.uniform(-12, -3),
            weight_decay=random.uniform(0, 0.5),
            grad_clip_norm=float(random.choice([0.0, 1.0, 1e3])),
        )
        optim_step(state, params)
        bound, found = state.magnitudes, Magnitudes.measure(state.arena.buffers)
        assert found.finite
        assert found.params <= bound.params
        assert found.exp_avg <= bound.exp_avg
        assert found.exp_avg_sq <= bound.exp_avg_sq


def test_a_restored_run_is_measured_once(llama: Model) -> None:
    contents, meta = files(trained(llama), optimizer=True)
    state = llama.new_run(CONFIG)
    state.restore(contents, meta, optimizer=True)
    assert state.magnitudes == UNKNOWN
    state.check_weights()
    assert state.magnitudes == Magnitudes.measure(state.arena.buffers)
    assert state.magnitudes.finite


@pytest.mark.parametrize(
    ("params", "gradient"),
    [
        (SOUND, 1e19),
        (replace(SOUND, learning_rate=1e30), 1.0),
        (replace(SOUND, eps=0.0), 1.0),
        (replace(SOUND, beta1=0.99999999), 1.0),
        (replace(SOUND, weight_decay=1e40), 1.0),
        (SOUND, float("nan")),
        (SOUND, float("inf")),
    ],
    ids=str,
)
def test_no_bound_is_claimed_where_a_number_may_overflow(
    params: AdamParams, gradient: float
) -> None:
    before = Magnitudes(1.0, 0.0, 0.0)
    assert before.after_step(SOUND, 1, 1.0).finite
    assert before.after_step(params, 1, gradient) == UNKNOWN
    assert not UNKNOWN.after_step(SOUND, 1, 1.0).finite


def test_no_bound_is_claimed_where_the_square_of_a_gradient_alone_may_overflow() -> None:
    params = replace(SOUND, beta2=0.9999)
    before = Magnitudes(1.0, 0.0, 0.0)
    assert before.after_step(params, 10**6, 1e18).finite
    assert before.after_step(params, 10**6, 1e19) == UNKNOWN


# Steps that would diverge

DIVERGING: dict[str, tuple[float | None, AdamParams, str]] = {
    "learning rate": (None, AdamParams(learning_rate=1e38), "the weights would hold"),
    "beyond float32": (None, AdamParams(learning_rate=1e300), "the weights would hold"),
    "squares": (1e20, SOUND, r"second moments \(exp_avg_sq\) would hold.*norm is \d"),
    "eps 0 where nothing has a gradient": (0.0, AdamParams(eps=0.0), "the weights would hold"),
    "weight decay": (None, AdamParams(1e20, weight_decay=1e30), "the weights would hold"),
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_step_that_would_diverge_fails_and_changes_nothing(llama: Model, name: str) -> None:
    value, params, words = DIVERGING[name]
    state = with_gradients(llama, value)
    if value == 0.0:
        state = llama.new_run(CONFIG)
        state.has_gradients = True
    before = everything(state)
    with pytest.raises(Diverged, match=words) as failure:
        optim_step(state, params)
    assert "pending gradients are as before" in str(failure.value)
    assert everything(state) == before


def test_a_failed_step_can_be_made_again_with_other_parameters(llama: Model) -> None:
    state, other = with_gradients(llama), with_gradients(llama)
    with pytest.raises(Diverged):
        optim_step(state, AdamParams(learning_rate=1e38))
    assert optim_step(state, SOUND) == optim_step(other, SOUND)
    assert everything(state) == everything(other)


def test_a_capture_keeps_its_state_through_failed_and_copied_steps(llama: Model) -> None:
    state = with_gradients(llama)
    before, _ = files(state, optimizer=True)
    capture = state.capture(optimizer=True)
    with pytest.raises(Diverged):
        optim_step(state, AdamParams(learning_rate=1e38))
    optim_step(state, replace(SOUND, eps=0.0))
    held = {name: b"".join(map(bytes, chunks)) for name, chunks in capture.files().items()}
    capture.release()
    assert held == before
    assert not state.arena._pins


def test_clipping_scales_gradients_whose_norm_overflows(llama: Model) -> None:
    state = with_gradients(llama, 1e20)
    count = state.arena.size
    metrics = optim_step(state, replace(SOUND, grad_clip_norm=1.0, beta1=0.0))
    assert metrics["grad_norm"] == pytest.approx(1e20 * count**0.5)
    assert state.arena.buffers["exp_avg"].norm() == pytest.approx(1.0, rel=1e-3)


def test_infinite_pending_gradients_fail_the_step(llama: Model) -> None:
    state = with_gradients(llama)
    state.arena.buffers["grads"][5] = float("inf")
    before = everything(state)
    for clip in (0.0, 1.0):
        with pytest.raises(Diverged, match="pending gradients hold NaN or infinity in 1 of"):
            optim_step(state, replace(SOUND, grad_clip_norm=clip))
        assert everything(state) == before


def test_a_step_may_diverge_where_that_is_allowed(llama: Model) -> None:
    state = with_gradients(llama)
    optim_step(state, AdamParams(learning_rate=1e38), may_diverge=True)
    assert state.step == 3
    assert not is_finite(state.arena.buffers["params"])
    before = everything(state)
    with pytest.raises(Diverged, match="This adapter has diverged: its weights hold"):
        optim_step(state, SOUND)
    assert everything(state) == before


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_step_on_infinite_moments_fails(llama: Model, moment: str) -> None:
    state = restored(llama, moment, float("inf"))
    backward(llama, state, examples(7))
    before = everything(state)
    with pytest.raises(Diverged, match=r"optimizer has diverged.*load_state"):
        optim_step(state, SOUND)
    assert everything(state) == before


# Passes


def huge(model: Model) -> RunState:
    """A run whose weights are finite, and too large for the model."""
    state = trained(model)
    state.arena.buffers["params"].fill_(1e30)
    return state


@pytest.mark.parametrize("run", [forward, backward])
def test_a_pass_of_a_diverged_adapter_names_it(llama: Model, run: Callable[..., Any]) -> None:
    state = huge(llama)
    before = everything(state)
    with pytest.raises(Diverged, match=r"This adapter has diverged: .*largest weight is 1e\+30"):
        run(llama, state, examples(1))
    with pytest.raises(Diverged, match="This adapter has diverged: its weights hold NaN"):
        run(llama, restored(llama, "params", float("nan")), examples(1))
    assert everything(state) == before


def test_gradients_that_overflow_with_the_pending_ones_fail_the_pass(llama: Model) -> None:
    state = trained(llama)
    backward(llama, state, examples(1))
    state.arena.buffers["grads"].mul_(3.4e38 / float(state.arena.buffers["grads"].abs().max()))
    before = everything(state)
    large = examples(1)
    for example in large:
        example.inputs["weights"] *= np.float32(1e36)
    with pytest.raises(InputError, match=r"sum of the gradients.*pending"):
        backward(llama, state, large)
    assert everything(state) == before


# Samples


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_loaded_for_sampling(
    llama: Model, value: float
) -> None:
    with pytest.raises(Diverged, match=r"its weights hold NaN or infinity in 1 of \d+ tensors"):
        adapter(llama, restored(llama, "params", value))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_tokens": 0},
        {"max_tokens": 0, "prompt_logprobs": True},
        {"max_tokens": 0, "prompt_logprobs": True, "topk_prompt_logprobs": 3},
        {"max_tokens": 0, "prompt_alt_tokens_k": 2},
        {"max_tokens": 0, "target_prompt_logprobs": np.ones((2, 1), np.int64)},
        {"temperature": 0.0, "topk_sample_logprobs": 2},
    ],
    ids=str,
)
def test_every_kind_of_sample_of_a_diverged_adapter_names_it(
    llama: Model, settings: dict[str, Any]
) -> None:
    diverged = ended(llama, SampleSpec(prompt(), **{"max_tokens": 3, **settings}), huge(llama))
    assert isinstance(diverged, Diverged)
    assert "This adapter has diverged: the model's logits" in str(diverged)
    assert "largest weight is 1e+30" in str(diverged)


def test_a_position_whose_logits_are_not_finite_is_not_scored(llama: Model) -> None:
    states = torch.zeros(3, llama.module.config.hidden_size)
    states[1] = float("nan")
    spec = SampleSpec(prompt(), prompt_logprobs=True)
    with pytest.raises(Diverged, match="the model's logits with it are not finite"):
        score_prompt(llama, states, spec, adapter=adapter(llama, trained(llama)))
    with pytest.raises(InputError, match="The base model's logits are not finite"):
        score_prompt(llama, states, spec)


def ended(model: Model, spec: SampleSpec, state: RunState) -> Any:
    batch, used = SamplingBatch(model), adapter(model, state)
    assert isinstance(used, Adapter)
    batch.add("one", spec, used)
    results: dict[str, Any] = {}
    while batch.busy:
        results.update(batch.step())
    return results["one"]
