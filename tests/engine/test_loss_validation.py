"""Training validation: a pass that cannot be computed is rejected with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from everstep.engine import AdapterConfig
from everstep.engine.errors import InputError
from everstep.engine.validation import check_adapter, check_pass
from everstep.wire.messages.passes import Example

IDS = np.arange(1, 5)
ONES = np.ones(4, np.float32)
POLICY: dict[str, Any] = {"target_tokens": IDS, "logprobs": -ONES, "advantages": ONES}


def changed(array: Any, position: Any, value: float) -> Any:
    copy = array.copy()
    copy[position] = value
    return copy


def refusal(data: list[Example], loss_fn: str, config: dict[str, Any] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        check_pass(
            data,
            loss_fn,
            config or {},
            vocab_size=259,
            max_context_length=16,
            refuse_stable_reinforce=config is None,
        )
    return str(caught.value)


def datum(inputs: dict[str, Any], tokens: Any = IDS, **kwargs: Any) -> Example:
    return Example(np.asarray(tokens, dtype=np.int64), inputs, **kwargs)


@pytest.mark.parametrize("loss_fn", ["stable_reinforce", "reinforce", "", "PPO"])
def test_an_unknown_or_refused_loss_is_named_with_the_known_ones(loss_fn: str) -> None:
    text = refusal([datum({"target_tokens": IDS})], loss_fn)
    assert repr(loss_fn) in text
    for known in ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"):
        assert known in text
    assert ("not public" in text) == (loss_fn == "stable_reinforce")
    assert "forward_backward_custom" in text


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
@pytest.mark.parametrize("missing", ["target_tokens", "logprobs", "advantages"])
def test_a_missing_input_is_named(loss_fn: str, missing: str) -> None:
    inputs = {**POLICY, **({"sequence_ratio_mask": ONES} if loss_fn == "gspo" else {})}
    check_pass([datum(inputs)], loss_fn, {}, vocab_size=259, max_context_length=16)
    del inputs[missing]
    good = datum({**inputs, missing: POLICY[missing]})
    text = refusal([good, datum(inputs)], loss_fn)
    assert "datum 1" in text
    assert missing in text
    assert loss_fn in text


BAD: dict[str, tuple[Example, str, dict[str, Any], str]] = {
    "gspo without mask": (datum(POLICY), "gspo", {}, "sequence_ratio_mask"),
    "cross_entropy without targets": (datum({}), "cross_entropy", {}, "target_tokens"),
    "unknown input": (
        datum({"target_tokens": IDS, "mask": ONES}),
        "cross_entropy",
        {},
        "'mask'",
    ),
    "weights for ppo": (datum({**POLICY, "weights": ONES}), "ppo", {}, "'weights'"),
    "NaN advantage": (
        datum({**POLICY, "advantages": changed(ONES, 2, np.nan)}),
        "ppo",
        {},
        "'advantages'] is nan at position 2",
    ),
    "infinite logprob": (
        datum({**POLICY, "logprobs": changed(ONES, 1, -np.inf)}),
        "dro",
        {},
        "'logprobs'] is -inf at position 1",
    ),
    "NaN weight": (
        datum({"target_tokens": IDS, "weights": changed(ONES, 0, np.nan)}),
        "cross_entropy",
        {},
        "'weights'",
    ),
    "short advantages": (datum({**POLICY, "advantages": ONES[:3]}), "ppo", {}, "[3]"),
    "weights [T] for targets [T, K]": (
        datum({"target_tokens": np.stack([IDS, IDS], 1), "weights": ONES}),
        "cross_entropy",
        {},
        "[4, 2]",
    ),
    "targets [T, K] for ppo": (
        datum({**POLICY, "target_tokens": np.stack([IDS, IDS], 1)}),
        "ppo",
        {},
        "[T]",
    ),
    "targets [T, 0]": (
        datum({"target_tokens": np.zeros((4, 0), np.int64)}),
        "cross_entropy",
        {},
        "[4, 0]",
    ),
    "scalar targets": (
        datum({"target_tokens": np.array(3)}),
        "cross_entropy",
        {},
        "target_tokens has shape []",
    ),
    "targets shorter than the input": (
        datum({"target_tokens": IDS[:3]}),
        "cross_entropy",
        {},
        "T = 4",
    ),
    "targets of floats": (datum({"target_tokens": ONES}), "cross_entropy", {}, "int64"),
    "target out of range": (
        datum({"target_tokens": changed(IDS, 3, 259)}),
        "cross_entropy",
        {},
        "259 at position 3",
    ),
    "negative target": (
        datum({"target_tokens": changed(IDS, 0, -100)}),
        "cross_entropy",
        {},
        "-100 at position 0",
    ),
    "token out of range": (
        datum({"target_tokens": IDS}, [1, 2, 300, 4]),
        "cross_entropy",
        {},
        "300 at position 2",
    ),
    "no tokens": (datum({"target_tokens": IDS[:0]}, []), "cross_entropy", {}, "no tokens"),
    "too long": (
        datum({"target_tokens": np.ones(17, np.int64)}, np.ones(17)),
        "cross_entropy",
        {},
        "17 tokens; the model's context window is 16",
    ),
    "an image": (datum({"target_tokens": IDS}, media=("image",)), "cross_entropy", {}, "'image'"),
    "unknown setting": (datum(POLICY), "ppo", {"beta": 0.1}, "clip_low_threshold"),
    "setting where there is none": (
        datum({"target_tokens": IDS}),
        "cross_entropy",
        {"temperature": 1.0},
        "nothing",
    ),
    "NaN setting": (datum(POLICY), "dro", {"beta": float("nan")}, "finite"),
    "text as a setting": (datum(POLICY), "dro", {"beta": "0.1"}, "finite number"),
    "thresholds crossed": (
        datum(POLICY),
        "ppo",
        {"clip_low_threshold": 1.5, "clip_high_threshold": 1.1},
        "1.5",
    ),
    "threshold crossed with the default": (
        datum(POLICY),
        "ppo",
        {"clip_high_threshold": 0.2},
        "clip_low_threshold",
    ),
    "recorded logprobs from a client": (
        datum({**POLICY, "sampling_logprobs": -ONES}),
        "stable_reinforce",
        {},
        "'sampling_logprobs'] is unknown to stable_reinforce; it takes target_tokens, advantages, "
        "logprobs",
    ),
    "custom weights with recorded logprobs": (
        datum({**POLICY, "weights": ONES}),
        "stable_reinforce",
        {},
        "'weights'] is unknown to stable_reinforce",
    ),
    "NaN advantage with recorded logprobs": (
        datum({**POLICY, "advantages": changed(ONES, 2, float("nan"))}),
        "stable_reinforce",
        {},
        "'advantages'] is nan at position 2",
    ),
    "negative alpha": (datum(POLICY), "stable_reinforce", {"alpha": -1}, "its minimum is 0"),
    "negative kl_coeff": (
        datum(POLICY),
        "stable_reinforce",
        {"kl_coeff": -0.1},
        "kl_coeff is -0.1",
    ),
    "negative mask": (
        datum({**POLICY, "sequence_ratio_mask": changed(ONES, 1, -1)}),
        "gspo",
        {},
        "'sequence_ratio_mask'] holds -1.0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_pass_is_rejected(name: str) -> None:
    example, loss_fn, config, words = BAD[name]
    text = refusal([example], loss_fn, config)
    assert words in text
    if not config:
        assert "datum 0" in text


def test_a_pass_without_data_is_rejected() -> None:
    assert "data is empty" in refusal([], "cross_entropy")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AdapterConfig(rank=0), "lora_config.rank must be positive"),
        (AdapterConfig(rank=-4), "got -4"),
        (AdapterConfig(rank=1025), "at most 1024"),
        (AdapterConfig(rank=4, seed=-1), "seed"),
        (AdapterConfig(rank=4, seed=2**63), "seed must be 0 to 2"),
        (AdapterConfig(rank=4, seed="7"), "seed"),  # type: ignore[arg-type]
        (AdapterConfig(rank=4, seed=True), "seed"),
        (
            AdapterConfig(rank=4, train_attn=False, train_mlp=False, train_unembed=False),
            "At least one of train_unembed, train_mlp, or train_attn must be True",
        ),
    ],
)
def test_an_invalid_adapter_is_rejected(config: AdapterConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_adapter(config)
