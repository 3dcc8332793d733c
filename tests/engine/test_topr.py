"""Tapered off-policy REINFORCE: the paper's update, its limits, and gradients of the adapter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine import Model, RunState, forward_backward, numerics
from everstep.engine.errors import InputError
from everstep.engine.losses.objective import combine_metrics
from everstep.engine.losses.specs import LOSSES, STABLE_REINFORCE
from everstep.wire.messages.passes import Example
from tests.engine.helpers import finish, trained
from tests.profiles import example_count

SPEC = LOSSES[STABLE_REINFORCE]
Inputs = dict[str, torch.Tensor]
Array = np.ndarray[Any, Any]


def compute(logp: torch.Tensor, inputs: Inputs, **settings: float) -> torch.Tensor:
    return SPEC.resolve()(logp, numbered(inputs), {**SPEC.defaults, **settings})


def measure(logp: torch.Tensor, inputs: Inputs, **settings: float) -> dict[str, float]:
    metrics = SPEC.resolve_metrics()
    assert metrics is not None
    found = metrics(logp, numbered(inputs), {**SPEC.defaults, **settings})
    return {name: math.fsum(numbers.tolist()) for name, numbers in found.items()}


def numbered(inputs: Inputs) -> Inputs:
    """Add the numbers of the sequences, as the engine does."""
    count = int(inputs["sampled_sequences"].max()) + 1
    return {**inputs, "sequence_numbers": torch.arange(count)}


def reference(logp: list[torch.Tensor], inputs: Inputs, alpha: float, kappa: float) -> torch.Tensor:
    """Compute the loss one sampled sequence and one token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    sequences = inputs["sampled_sequences"].tolist()
    for sequence in sorted(set(sequences) - {-1}):
        mine = [t for t, each in enumerate(sequences) if each == sequence]
        ratio = math.prod(
            math.exp(float(logp[t].detach()) - float(inputs["sampling_logprobs"][t])) for t in mine
        )
        for t in mine:
            advantage = float(inputs["advantages"][t])
            coefficient = min(ratio, alpha) if advantage < 0 else 1.0
            gap = logp[t] - float(inputs["sampling_logprobs"][t])
            total = total - coefficient * advantage * logp[t] + kappa / 2 * gap**2
    return total


@example_count(60)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 30),
    constant=st.booleans(),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    kappa=st.sampled_from([0.0, 0.25]),
)
def test_loss_and_gradient_equal_the_papers_update(
    seed: int, length: int, constant: bool, alpha: float, kappa: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    sequences = torch.randint(-1, 3, (length,), generator=random)
    sampled = sequences >= 0
    logp = -3 * torch.rand(length, generator=random)
    per_sequence = torch.randn(3, generator=random)[sequences.clamp(min=0)]
    per_token = torch.randn(length, generator=random)
    inputs = {
        "sampled_sequences": sequences,
        "sampling_logprobs": (logp + 0.3 * torch.randn(length, generator=random)) * sampled,
        "advantages": (per_sequence if constant else per_token) * sampled,
    }
    ours = logp.clone().requires_grad_()
    found = compute(ours, inputs, alpha=alpha, kl_coeff=kappa)
    theirs = [each.double().requires_grad_() for each in logp]
    expected = reference(theirs, inputs, alpha, kappa)
    scale = 1e-6 * (1 + float(inputs["advantages"].abs().sum()))
    assert abs(float(found.detach()) - float(expected.detach())) < 10 * scale
    (slopes,) = torch.autograd.grad(found, ours)
    if not sampled.any():
        assert not slopes.any()
        return
    wanted = torch.autograd.grad(expected, theirs, allow_unused=True)
    for t, each in enumerate(wanted):
        assert abs(float(slopes[t]) - float(each if each is not None else 0)) < 10 * scale


def two_sequences(gaps: list[float], advantages: list[float]) -> tuple[torch.Tensor, Inputs]:
    """A prompt token, two tokens of a first sequence and one of a second."""
    logp = torch.tensor([-9.0, -1.0, -1.0, -1.0])
    inputs = {
        "sampled_sequences": torch.tensor([-1, 0, 0, 1]),
        "sampling_logprobs": torch.tensor([0.0, *(-1.0 - gap for gap in gaps)]),
        "advantages": torch.tensor([0.0, *advantages]),
    }
    return logp.requires_grad_(), inputs


def slopes_of(loss: torch.Tensor, logp: torch.Tensor) -> list[float]:
    (found,) = torch.autograd.grad(loss, logp)
    return [round(each, 6) for each in found.tolist()]


def test_a_sequence_is_tapered_by_the_ratio_of_all_its_tokens() -> None:
    halved = math.log(0.5) / 2
    logp, inputs = two_sequences([halved, halved, 0.0], [-1.0, -2.0, 3.0])
    assert slopes_of(compute(logp, inputs), logp) == [0.0, 0.5, 1.0, -3.0]
    assert measure(logp, inputs) == {
        "stable_reinforce/everstep_topr:max": 1.0,
        "stable_reinforce/negative_sequences:sum": 1.0,
        "stable_reinforce/negative_weight:sum": pytest.approx(0.5),
    }


def test_positive_advantages_are_never_weighted() -> None:
    logp, inputs = two_sequences([-40.0, -40.0, 40.0], [1.0, 1.0, 2.0])
    assert slopes_of(compute(logp, inputs), logp) == [0.0, -1.0, -1.0, -2.0]


def test_alpha_limits_the_ratio_even_if_it_overflows() -> None:
    logp, inputs = two_sequences([900.0, 900.0, 0.3], [-1.0, -1.0, -1.0])
    assert slopes_of(compute(logp, inputs), logp) == [0.0, 1.0, 1.0, 1.0]
    assert slopes_of(compute(logp, inputs, alpha=4.0), logp)[:3] == [0.0, 4.0, 4.0]
    assert slopes_of(compute(logp, inputs, alpha=0.0), logp) == [0.0, 0.0, 0.0, 0.0]


def test_kl_coeff_pulls_every_sampled_token_to_its_recorded_logprob() -> None:
    logp, inputs = two_sequences([0.5, -0.25, 0.0], [0.0, 0.0, 0.0])
    loss = compute(logp, inputs, kl_coeff=2.0)
    assert float(loss.detach()) == pytest.approx(0.5**2 + 0.25**2)
    assert slopes_of(loss, logp) == [0.0, 1.0, -0.5, 0.0]


def test_a_prompt_tokens_logprob_is_never_read() -> None:
    logp, inputs = two_sequences([0.1, 0.1, 0.1], [-1.0, -1.0, 1.0])
    with torch.no_grad():
        logp[0] = -math.inf
    loss = compute(logp, inputs, kl_coeff=1.0)
    assert torch.isfinite(loss)
    assert slopes_of(loss, logp)[0] == 0.0


def test_metrics_are_reduced_as_their_names_say() -> None:
    each = [{"a:max": 1.0, "b:sum": 2.0, "c:mean": 1.0}, {"a:max": 0.5, "b:sum": 3.0, "c:mean": 2}]
    assert combine_metrics(each) == {"a:max": 1.0, "b:sum": 5.0, "c:mean": 1.5}


# Through the model


def example(length: int, seed: int) -> Example:
    random = np.random.default_rng([length, seed])
    sequences = np.repeat([-1, 0, 1], [2, length // 2, length - 2 - length // 2])
    signs = np.array([1.0, -1.0])[sequences.clip(0)] * (sequences >= 0)
    return Example(
        random.integers(0, 256, length),
        {
            "target_tokens": random.integers(0, 256, length),
            "advantages": (signs * random.random(length)).astype(np.float32),
            "sampling_logprobs": np.where(sequences >= 0, -5.4, 0).astype(np.float32),
            "sampled_sequences": sequences,
        },
    )


def run(model: Model, state: RunState, data: list[Example], *, backward: bool = True) -> Any:
    settings: dict[str, float | str] = {"kl_coeff": 0.1, "alpha": 0.7}
    steps = forward_backward(model, state, data, STABLE_REINFORCE, settings, backward=backward)
    return finish(steps)


def test_adapters_gradient_equals_finite_differences(llama: Model) -> None:
    """The weights of the terms are constants: they are computed once, where the gradient is."""
    state, data = trained(llama), [example(length, 3) for length in (6, 11)]
    result = run(llama, state, data)

    def weight(logps: Array, inputs: Any) -> Array:
        sequences, weights = inputs["sampled_sequences"], np.ones(len(logps))
        for each in (0, 1):
            gaps = (logps - inputs["sampling_logprobs"])[sequences == each]
            limited = min(np.exp(gaps.astype(np.float64).sum()), 0.7)
            weights[(sequences == each) & (inputs["advantages"] < 0)] = limited
        return weights

    fixed = [
        weight(output["logprobs"], each.inputs)
        for output, each in zip(result.outputs, data, strict=True)
    ]
    assert any((each < 0.7).any() for each in fixed), "some are below the limit"

    def frozen() -> float:
        total = 0.0
        outputs = run(llama, state, data, backward=False).outputs
        for output, each, weights in zip(outputs, data, fixed, strict=True):
            logp = output["logprobs"].astype(np.float64)
            gaps = (logp - each.inputs["sampling_logprobs"])[each.inputs["sampled_sequences"] >= 0]
            total += -(weights * logp * each.inputs["advantages"]).sum() + 0.05 * (gaps**2).sum()
        return total

    gradient = state.arena.buffers["grads"].clone()
    parameters = state.arena.buffers["params"]
    start = parameters.clone()
    direction = torch.nn.functional.normalize(gradient, dim=0)
    size = 1e-3
    ends = []
    for sign in (1, -1):
        parameters.copy_(start + sign * size * direction)
        ends.append(frozen())
    slope = (ends[0] - ends[1]) / (2 * size)
    assert slope == pytest.approx(float(gradient @ direction), rel=1e-3)


def test_micro_batches_change_nothing(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [example(length, 5) for length in (30, 9, 31, 8)]
    together, apart = trained(llama), trained(llama)
    apart.numerics = numerics.Numerics(4)
    whole = run(llama, together, data)
    cut = run(llama, apart, data)
    assert cut.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        assert cut.metrics[name] == pytest.approx(value, rel=1e-5)
    expected = together.arena.buffers["grads"]
    assert expected.norm() > 0
    assert (apart.arena.buffers["grads"] - expected).norm() < 1e-6 * expected.norm()


def test_a_loss_that_is_not_finite_fails_and_leaves_no_gradient(llama: Model) -> None:
    state, bad = trained(llama), example(6, 1)
    inputs = {**bad.inputs, "advantages": np.full(6, 3e38, np.float32)}
    with pytest.raises(InputError, match="loss is inf"):
        run(llama, state, [Example(bad.tokens, inputs)])
    assert not state.has_gradients
