"""Optimizer: equals `torch.optim.AdamW` with clipping, for any parameters of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from everstep.engine import AdamParams, AdapterConfig, Model, optim_step
from everstep.engine.errors import ConfigMismatch
from tests.engine.helpers import CONFIG, backward, buffers, examples, files, trained
from tests.engine.test_reference import distance

DEFAULT = AdamParams(learning_rate=1e-2)
SERIES = {
    "defaults": [DEFAULT] * 5,
    "decay": [replace(DEFAULT, weight_decay=0.3)] * 5,
    "clipped": [replace(DEFAULT, grad_clip_norm=0.7)] * 5,
    "clipped far above the norm": [replace(DEFAULT, grad_clip_norm=1e6)] * 5,
    "another rate each step": [replace(DEFAULT, learning_rate=1e-2 / n) for n in range(1, 6)],
    "other betas and eps": [AdamParams(1e-3, 0.5, 0.999, 1e-5, 0.01, 1.0)] * 5,
}


@pytest.mark.parametrize("name", SERIES)
def test_five_steps_equal_torchs_on_the_same_gradients(llama: Model, name: str) -> None:
    state = llama.new_run(CONFIG)
    parameters = {
        n: torch.nn.Parameter(view.clone()) for n, view in state.arena.views("params").items()
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0)
    random = torch.Generator().manual_seed(1)
    for step, params in enumerate(SERIES[name], 1):
        state.arena.buffers["grads"].normal_(0, 0.1**step, generator=random)
        for n, view in state.arena.views("grads").items():
            parameters[n].grad = view.clone()
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        assert len(gradients) == len(parameters)
        norm = torch.nn.utils.get_total_norm(gradients)
        if params.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), params.grad_clip_norm)
        optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        optimizer.step()
        metrics = optim_step(state, params)
        assert metrics == {
            "optimizer_step": step,
            "grad_norm": pytest.approx(float(norm), rel=1e-5),
        }
        assert not state.has_gradients
        assert not state.arena.buffers["grads"].any()
    theirs = {n: p.detach() for n, p in parameters.items()}
    assert distance(state.arena.views("params"), theirs) < 1e-6
    for moment in ("exp_avg", "exp_avg_sq"):
        theirs = {n: optimizer.state[p][moment] for n, p in parameters.items()}
        assert distance(state.arena.views(moment), theirs) < 1e-6


def test_the_seed_determines_the_initial_weights(llama: Model) -> None:
    def begin(seed: int) -> bytes:
        return buffers(llama.new_run(AdapterConfig(rank=4, seed=seed)))["params"]

    assert begin(3) == begin(3)
    assert len({begin(seed) for seed in (0, 1, 2, 2**32, 2**63 - 1)}) == 5
    views = llama.new_run(CONFIG).arena.views("params")
    assert views
    for name, view in views.items():
        bound = view.shape[1] ** -0.5 if "lora_A" in name else 0.0
        assert view.abs().max() <= bound, name
        assert bool(view.any()) == ("lora_A" in name), name


def test_a_restore_without_optimizer_equals_a_new_run_with_these_weights(
    llama: Model,
) -> None:
    source, state = trained(llama, seed=5), trained(llama, seed=6)
    for each in (source, state):
        backward(llama, each, examples(1))  # pending in both
    contents, meta = files(source, optimizer=True)
    state.restore(contents, meta, optimizer=False)
    new = llama.new_run(CONFIG)
    weights = {**buffers(new), "params": buffers(source)["params"]}
    assert buffers(state) == weights
    assert (state.step, state.has_gradients) == (0, False) == (new.step, new.has_gradients)


def test_capture_may_leave_out_moments_that_are_zero_and_no_others(llama: Model) -> None:
    source, state = llama.new_run(CONFIG), trained(llama, seed=6)
    backward(llama, source, examples(1))
    expected = buffers(source)
    contents, meta = files(source, optimizer=True, zero_moments=False)
    assert meta["zero_moments"] and "optimizer.safetensors" not in contents
    state.restore(contents, meta, optimizer=True)
    assert buffers(state) == expected
    assert (state.step, state.has_gradients, state.has_moments) == (0, True, False)

    whole, meta = files(source, optimizer=True)
    assert not meta["zero_moments"] and "optimizer.safetensors" in whole
    optim_step(state, DEFAULT)
    contents, meta = files(state, optimizer=True, zero_moments=False)
    assert not meta["zero_moments"] and "optimizer.safetensors" in contents
    state.restore(whole, {"step": 0}, optimizer=True)
    assert buffers(state) == expected
    assert not files(state, optimizer=True, zero_moments=False)[1]["zero_moments"], "not known"


def test_missing_moments_are_an_error_unless_they_are_said_to_be_zero(llama: Model) -> None:
    state = trained(llama, seed=6)
    before = buffers(state)
    contents, _ = files(state, optimizer=False)
    with pytest.raises(ConfigMismatch, match="no optimizer state"):
        state.restore(contents, {"step": 3}, optimizer=True)
    assert buffers(state) == before
