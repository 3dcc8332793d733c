"""Losses of probability ratios, by formulas written apart, and where ratios leave all bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.engine import Model, forward_backward, passes
from everstep.engine.errors import InputError
from everstep.engine.losses import LOSSES
from everstep.engine.validation import CONFIG
from everstep.wire.passes import Example
from tests.engine.helpers import finish, trained

Inputs = dict[str, torch.Tensor]
THRESHOLDS = [(0.8, 1.2), (0.9997, 1.0004), (0.0, 4.0), (1.0, 1.0)]


def reference(logp: torch.Tensor, inputs: Inputs, low: float, high: float) -> torch.Tensor:
    """GSPO-token as its paper writes it: a sum over positions, one after the other."""
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


def gradient(loss: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, logp)
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(1, 40),
    thresholds=st.sampled_from(THRESHOLDS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_gspo_is_its_paper(
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
    found = LOSSES["gspo"](ours, inputs, config)
    expected = reference(theirs, {k: v.double() for k, v in inputs.items()}, low, high)
    scale = float(inputs["advantages"].abs().sum()) + 1e-9
    close = 1e-6 if dtype == torch.float32 else 1e-12
    assert abs(float((found - expected).detach())) <= 4 * close * scale
    wanted = gradient(expected, theirs)
    ratio = float(
        torch.exp(
            (logp - inputs["logprobs"])[inputs["sequence_ratio_mask"] != 0].double().mean()
        ).nan_to_num(1.0)
    )
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
def test_a_token_without_advantage_counts_nothing_even_where_its_ratio_overflows(
    loss_fn: str,
) -> None:
    # float32 has no exp(200)
    logp, inputs = inputs_of([1.0, 0.0], [0.0, 200.0], [1.0, 0.0])
    loss = LOSSES[loss_fn](logp, inputs, CONFIG[loss_fn])
    slopes = gradient(loss, logp)
    assert torch.isfinite(loss)
    assert slopes[1] == 0
    assert slopes[0] == -1.0


@pytest.mark.parametrize("loss_fn", ["ppo", "gspo"])
def test_a_ratio_that_overflows_is_clipped_like_any_other(loss_fn: str) -> None:
    logp, inputs = inputs_of([2.0], [300.0], [1.0])
    loss = LOSSES[loss_fn](logp, inputs, CONFIG[loss_fn])
    assert float(loss) == pytest.approx(-2.0 * 1.2)
    assert gradient(loss, logp) == 0


def test_gspo_without_a_selected_token_has_ratio_one() -> None:
    logp, inputs = inputs_of([1.0, -2.0], [0.7, 5.0], [0.0, 0.0])
    loss = LOSSES["gspo"](logp, inputs, CONFIG["gspo"])
    assert float(loss) == pytest.approx(1.0)
    assert gradient(loss, logp).tolist() == [-1.0, 2.0]


def test_a_mask_selects_or_doesnt() -> None:
    """The mean is over the selected tokens: a mask's values are no weights."""
    _, one = inputs_of([1.0, 1.0], [0.1, -0.3], [1.0, 1.0])
    logp, other = inputs_of([1.0, 1.0], [0.1, -0.3], [0.5, 3.0])
    assert LOSSES["gspo"](logp, one, CONFIG["gspo"]) == LOSSES["gspo"](logp, other, CONFIG["gspo"])


def example(length: int, random: np.random.Generator, gap: float = 0.3) -> Example:
    inputs = {
        "target_tokens": random.integers(0, 256, length),
        "logprobs": (-5 + gap * random.normal(size=length)).astype(np.float32),
        "advantages": np.full(length, random.normal(), np.float32),
        "sequence_ratio_mask": (random.random(length) < 0.5).astype(np.float32),
    }
    return Example(random.integers(0, 256, length), inputs)


def test_a_sequence_is_whole_however_a_pass_is_cut(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(5)
    data = [example(length, random) for length in (30, 9, 31, 8, 2)]
    together, apart = trained(llama), trained(llama)
    whole = finish(forward_backward(llama, together, data, "gspo", {}, backward=True))
    monkeypatch.setattr(passes, "TOKENS_PER_MICRO_BATCH", 4)
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
