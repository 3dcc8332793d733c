"""Losses of probability ratios: independent formulas, and ratios that overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.engine import Model, forward_backward, numerics
from everstep.engine.errors import InputError
from everstep.engine.losses.specs import LOSSES
from everstep.wire.messages.passes import Example
from tests.engine.helpers import finish, trained
from tests.profiles import example_count

Inputs = dict[str, torch.Tensor]
THRESHOLDS = [(0.8, 1.2), (0.9997, 1.0004), (0.0, 4.0), (1.0, 1.0)]


def reference(logp: torch.Tensor, inputs: Inputs, low: float, high: float) -> torch.Tensor:
    """Compute GSPO-token as in its paper: a sum over positions, one after the other."""
    chosen = [t for t, m in enumerate(inputs["sequence_ratio_mask"].tolist()) if m]
    geometric = torch.ones((), dtype=logp.dtype)
    for t in chosen:
        geometric = geometric * (logp[t].detach() - inputs["logprobs"][t]).exp() ** (
            1 / len(chosen)
        )
    total = torch.zeros((), dtype=logp.dtype)
    for t, advantage in enumerate(inputs["advantages"]):
        ratio = geometric.detach() * logp[t].exp() / logp[t].exp().detach()
        total = total - torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    return total


def compute(loss_fn: str, logp: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """A loss with its default settings."""
    return LOSSES[loss_fn].resolve()(logp, inputs, LOSSES[loss_fn].defaults)


def gradient(loss: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, logp)
    return found


@example_count(60)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 40),
    thresholds=st.sampled_from(THRESHOLDS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_gspo_equals_its_paper(
    seed: int, length: int, thresholds: tuple[float, float], dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(length, generator=random, dtype=dtype)
    inputs = {
        "logprobs": logp + 0.3 * torch.randn(length, generator=random, dtype=dtype),
        "advantages": torch.randn(length, generator=random, dtype=dtype),
        "sequence_ratio_mask": (torch.rand(length, generator=random) < 0.6).to(dtype) * 0.5,
    }
    low, high = thresholds
    config = {"clip_low_threshold": low, "clip_high_threshold": high}
    ours, theirs = logp.clone().requires_grad_(), logp.double().requires_grad_()
    found = LOSSES["gspo"].resolve()(ours, inputs, config)
    expected = reference(theirs, {k: v.double() for k, v in inputs.items()}, low, high)
    scale = float(inputs["advantages"].abs().sum()) + 1e-9
    close = 1e-6 if dtype == torch.float32 else 1e-12
    assert abs(float((found - expected).detach())) <= 4 * close * scale
    wanted = gradient(expected, theirs)
    selected = inputs["sequence_ratio_mask"] != 0
    log_ratio = (logp - inputs["logprobs"])[selected].detach().double().mean()
    ratio = float(torch.exp(log_ratio).nan_to_num(1.0))
    if min(abs(ratio - low), abs(ratio - high)) > 1e-5:  # else rounding decides what clips
        off = (gradient(found, ours) - wanted).norm()
        assert off <= close * wanted.norm() + 1e-300


def inputs_of(advantages: list[float], gaps: list[float], mask: list[float]) -> Any:
    logp = -torch.ones(len(gaps))
    inputs = {
        "logprobs": logp - torch.tensor(gaps),
        "advantages": torch.tensor(advantages),
        "sequence_ratio_mask": torch.tensor(mask),
    }
    return logp.requires_grad_(), inputs


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "gspo", "cispo"])
def test_a_token_without_advantage_is_ignored_even_if_its_ratio_overflows(
    loss_fn: str,
) -> None:
    # float32 has no exp(200)
    logp, inputs = inputs_of([1.0, 0.0], [0.0, 200.0], [1.0, 0.0])
    loss = compute(loss_fn, logp, inputs)
    slopes = gradient(loss, logp)
    assert torch.isfinite(loss)
    assert slopes[1] == 0
    assert slopes[0] == -1.0


@pytest.mark.parametrize("loss_fn", ["ppo", "gspo"])
def test_an_overflowing_ratio_is_clipped(loss_fn: str) -> None:
    logp, inputs = inputs_of([2.0], [300.0], [1.0])
    loss = compute(loss_fn, logp, inputs)
    assert float(loss.detach()) == pytest.approx(-2.0 * 1.2)
    assert gradient(loss, logp) == 0


def test_gspo_without_a_selected_token_has_ratio_one() -> None:
    logp, inputs = inputs_of([1.0, -2.0], [0.7, 5.0], [0.0, 0.0])
    loss = compute("gspo", logp, inputs)
    assert float(loss.detach()) == pytest.approx(1.0)
    assert gradient(loss, logp).tolist() == [-1.0, 2.0]


def test_the_masks_values_are_not_weights() -> None:
    """The mean is over the selected tokens. The mask's values are not weights."""
    _, one = inputs_of([1.0, 1.0], [0.1, -0.3], [1.0, 1.0])
    logp, other = inputs_of([1.0, 1.0], [0.1, -0.3], [0.5, 3.0])
    assert compute("gspo", logp, one) == compute("gspo", logp, other)


def example(length: int, random: np.random.Generator, gap: float = 0.3) -> Example:
    inputs: dict[str, np.ndarray[Any, Any]] = {
        "target_tokens": random.integers(0, 256, length),
        "logprobs": (-5 + gap * random.normal(size=length)).astype(np.float32),
        "advantages": np.full(length, random.normal(), np.float32),
        "sequence_ratio_mask": (random.random(length) < 0.5).astype(np.float32),
    }
    return Example(random.integers(0, 256, length), inputs)


def test_micro_batches_do_not_split_a_sequence(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    data = [example(length, random) for length in (30, 9, 31, 8, 2)]
    together, apart = trained(llama), trained(llama)
    apart.numerics = numerics.Numerics(4)
    whole = finish(forward_backward(llama, together, data, "gspo", {}, backward=True))
    cut = finish(forward_backward(llama, apart, data, "gspo", {}, backward=True))
    assert cut.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-6)
    expected = together.arena.buffers["grads"]
    assert expected.norm() > 0
    assert (apart.arena.buffers["grads"] - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
def test_a_loss_that_overflows_fails_and_leaves_no_gradient(llama: Model, loss_fn: str) -> None:
    state = trained(llama)
    bad = example(5, np.random.default_rng(1))
    inputs = {name: array for name, array in bad.inputs.items() if name != "sequence_ratio_mask"}
    inputs["logprobs"] = np.full(5, -400, np.float32)
    inputs["advantages"] = np.full(5, -1, np.float32)
    with pytest.raises(InputError, match="loss is inf"):
        finish(
            forward_backward(
                llama, state, [Example(bad.tokens, inputs)], loss_fn, {}, backward=True
            )
        )
    assert not state.has_gradients
    assert not state.arena.buffers["grads"].any()
