"""Built-in losses: values and gradients equal the protocol's formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from everstep.engine import Model, RunState, forward_backward
from everstep.engine.losses.specs import LOSSES
from everstep.engine.validation import check_pass
from everstep.wire.messages.passes import Example
from tests.engine.helpers import buffers, finish, trained

Array = np.ndarray[Any, Any]
LENGTHS = (6, 11, 3)


def clipped(ratio: Array, advantages: Array, low: float, high: float) -> float:
    return float(-np.minimum(ratio * advantages, np.clip(ratio, low, high) * advantages).sum())


def formula(loss_fn: str, logp: Array, inputs: dict[str, Array], config: dict[str, float]) -> float:
    """Compute one datum's loss by the protocol's formula, in float64."""
    if loss_fn == "cross_entropy":
        return float(-(logp * inputs.get("weights", np.ones_like(logp))).sum())
    q, a = inputs["logprobs"], inputs["advantages"]
    ratio = np.exp(logp - q)
    if loss_fn == "importance_sampling":
        return float(-(ratio * a).sum())
    if loss_fn == "dro":
        return float(-(logp * a - config.get("beta", 0.05) / 2 * (logp - q) ** 2).sum())
    low, high = (0.0, 4.0) if loss_fn == "cispo" else (0.8, 1.2)
    low = config.get("clip_low_threshold", low)
    high = config.get("clip_high_threshold", high)
    if loss_fn == "ppo":
        return clipped(ratio, a, low, high)
    if loss_fn == "cispo":
        return float(-(np.clip(ratio, low, high) * logp * a).sum())
    mask = inputs["sequence_ratio_mask"]
    mean = ((logp - q) * mask).sum() / mask.sum()
    return clipped(np.full_like(logp, np.exp(mean)), a, low, high)


def slope(loss_fn: str, logp: Array, inputs: dict[str, Array], config: dict[str, float]) -> Array:
    """Compute d loss / d logp of one datum by hand. It is zero where clipping applies."""
    if loss_fn == "cross_entropy":
        return np.asarray(-inputs.get("weights", np.ones_like(logp)))
    q, a = inputs["logprobs"], inputs["advantages"]
    ratio = np.exp(logp - q)
    if loss_fn == "importance_sampling":
        return np.asarray(-ratio * a)
    if loss_fn == "dro":
        return np.asarray(-(a - config.get("beta", 0.05) * (logp - q)))
    low, high = (0.0, 4.0) if loss_fn == "cispo" else (0.8, 1.2)
    low = config.get("clip_low_threshold", low)
    high = config.get("clip_high_threshold", high)
    if loss_fn == "cispo":
        return np.asarray(-np.clip(ratio, low, high) * a)
    if loss_fn == "gspo":
        mask = inputs["sequence_ratio_mask"]
        ratio = np.full_like(logp, np.exp(((logp - q) * mask).sum() / mask.sum()))
    free = np.where(a > 0, ratio < high, ratio > low)
    return np.asarray(-ratio * a * free)


def datums(loss_fn: str, logps: list[Array], seed: int = 0) -> list[Example]:
    """Create datums of a policy near the model's, so that some ratios are clipped."""
    made = []
    for logp, example in zip(logps, tokens(seed), strict=True):
        random = np.random.default_rng([seed, len(logp)])
        inputs = dict(example.inputs)
        if loss_fn == "cross_entropy":
            inputs["weights"] = random.normal(size=len(logp)).astype(np.float32)
        else:
            inputs["logprobs"] = (logp + random.normal(0, 0.5, len(logp))).astype(np.float32)
            inputs["advantages"] = random.normal(size=len(logp)).astype(np.float32)
        if loss_fn == "gspo":
            mask = (random.random(len(logp)) < 0.7).astype(np.float32)
            mask[0] = 1
            inputs["sequence_ratio_mask"] = mask
        made.append(Example(example.tokens, inputs))
    return made


def tokens(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example(random.integers(0, 256, n), {"target_tokens": random.integers(0, 256, n)})
        for n in lengths
    ]


def logits(model: Model, state: RunState, leaves: Any, example: Example) -> torch.Tensor:
    """Compute the logprobs of all tokens without the engine's pass."""
    with model.bind_weights(state.layout, leaves):
        hidden = model.hidden(torch.from_numpy(example.tokens).unsqueeze(0))
        return torch.log_softmax(model.logits(hidden)[0].double(), -1)


def reference_logps(model: Model, state: RunState, data: list[Example]) -> list[Array]:
    with torch.no_grad():
        rows = [logits(model, state, state.leaves(), example) for example in data]
    return [
        np.take_along_axis(row.numpy(), example.inputs["target_tokens"][:, None], 1)[:, 0]
        for row, example in zip(rows, data, strict=True)
    ]


def run(model: Model, state: RunState, data: list[Example], loss_fn: str, **config: float) -> Any:
    check_pass(data, loss_fn, config, vocab_size=259, max_context_length=256)
    return finish(forward_backward(model, state, data, loss_fn, config, backward=True))


CASES: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name, spec in LOSSES.items() if not spec.recorded),  # see test_topr
    ("ppo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}),
    ("ppo", {"clip_high_threshold": 2.0}),
    ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("gspo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.01}),
    ("dro", {"beta": 0.7}),
]


@pytest.mark.parametrize(("loss_fn", "config"), CASES)
def test_a_loss_and_its_gradients_equal_the_formulas(
    llama: Model, loss_fn: str, config: dict[str, float]
) -> None:
    state = trained(llama)
    logps = reference_logps(llama, state, tokens())
    data = datums(loss_fn, logps)
    result = run(llama, state, data, loss_fn, **config)
    expected = sum(
        formula(loss_fn, p, dict(e.inputs), config) for p, e in zip(logps, data, strict=True)
    )
    assert result.metrics == {"loss:sum": pytest.approx(expected, rel=1e-5)}
    for logp, output in zip(logps, result.outputs, strict=True):
        assert output["logprobs"].dtype == np.float32
        np.testing.assert_allclose(output["logprobs"], logp, atol=2e-6)

    leaves = state.leaves()
    surrogate = torch.zeros((), dtype=torch.float64)
    for logp, example in zip(logps, data, strict=True):
        weight = torch.from_numpy(slope(loss_fn, logp, dict(example.inputs), config)).double()
        targets = torch.from_numpy(example.inputs["target_tokens"]).unsqueeze(1)
        surrogate = (
            surrogate
            + (logits(llama, state, leaves, example).gather(1, targets)[:, 0] * weight).sum()
        )
    surrogate.backward()  # type: ignore[no-untyped-call]
    theirs = torch.cat([leaf.grad.ravel() for leaf in leaves.values()])  # type: ignore[union-attr]
    assert theirs.norm() > 0.1
    assert (state.arena.buffers["grads"] - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo", "gspo", "dro"])
def test_a_setting_changes_the_loss(llama: Model, loss_fn: str) -> None:
    state = trained(llama)
    data = datums(loss_fn, reference_logps(llama, state, tokens()))
    settings = {"beta": 3.0} if loss_fn == "dro" else {"clip_high_threshold": 1.01}
    plain = run(llama, state, data, loss_fn).metrics["loss:sum"]
    assert run(llama, state, data, loss_fn, **settings).metrics["loss:sum"] != plain


@pytest.mark.parametrize(("mask", "share"), [(0.0, 0.0), (0.05, 1.0), (1.0, 1.0)])
def test_gspos_mean_ignores_the_scale_of_the_mask(llama: Model, mask: float, share: float) -> None:
    state = trained(llama)
    logps = reference_logps(llama, state, tokens())
    data = datums("gspo", logps)
    expected = 0.0
    for logp, example in zip(logps, data, strict=True):
        assert isinstance(example.inputs, dict)
        example.inputs["sequence_ratio_mask"] = np.full(len(logp), mask, np.float32)
        ratio = np.exp(share * (logp - example.inputs["logprobs"]).mean())
        expected += clipped(np.full_like(logp, ratio), example.inputs["advantages"], 0.8, 1.2)
    found = run(llama, state, data, "gspo").metrics["loss:sum"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_several_targets_of_a_position_count_with_their_weights(llama: Model) -> None:
    state = trained(llama)
    random = np.random.default_rng(2)
    data, expected = [], 0.0
    for length, k in ((6, 3), (11, 1), (5, 4)):
        example = Example(
            random.integers(0, 256, length),
            {
                "target_tokens": random.integers(0, 256, (length, k)),
                "weights": random.normal(size=(length, k)).astype(np.float32),
            },
        )
        with torch.no_grad():
            row = logits(llama, state, state.leaves(), example).numpy()
        wanted = np.take_along_axis(row, example.inputs["target_tokens"], 1)
        expected -= (wanted * example.inputs["weights"]).sum()
        data.append((example, wanted))
    result = run(llama, state, [example for example, _ in data], "cross_entropy")
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    assert len(result.outputs) == 3
    for (example, wanted), output in zip(data, result.outputs, strict=True):
        assert output["logprobs"].shape == example.inputs["target_tokens"].shape
        np.testing.assert_allclose(output["logprobs"], wanted, atol=2e-6)


def test_absent_weights_count_as_one(llama: Model) -> None:
    state = trained(llama)
    with_ones = [
        Example(e.tokens, {**e.inputs, "weights": np.ones(len(e.tokens), np.float32)})
        for e in tokens()
    ]
    plain = run(llama, state, tokens(), "cross_entropy")
    assert run(llama, state, with_ones, "cross_entropy").metrics == plain.metrics


def test_a_forward_gives_the_same_numbers_and_no_gradient(llama: Model) -> None:
    state = trained(llama)
    before = buffers(state)
    given = finish(forward_backward(llama, state, tokens(), "cross_entropy", {}, backward=False))
    assert buffers(state) == before
    assert not state.has_gradients
    again = run(llama, state, tokens(), "cross_entropy")
    assert again.metrics == given.metrics
    assert len(given.outputs) == len(LENGTHS)
    for one, other in zip(given.outputs, again.outputs, strict=True):
        assert one["logprobs"].tobytes() == other["logprobs"].tobytes()


def test_a_long_pass_computes_its_logits_in_pieces(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = trained(llama), trained(llama)
    expected = run(llama, whole, tokens(), "cross_entropy")
    monkeypatch.setattr(
        "everstep.engine.models.model.HEAD_CELLS", 4 * 259
    )  # four positions a piece
    found = run(llama, pieces, tokens(), "cross_entropy")
    assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6)
    theirs = whole.arena.buffers["grads"]
    assert (pieces.arena.buffers["grads"] - theirs).norm() < 1e-6 * theirs.norm()
