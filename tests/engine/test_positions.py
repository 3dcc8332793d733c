"""Models whose positions depend on the longest sequence: chosen once, whatever a pass holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from everstep.engine import AdapterConfig, Model, SampleSpec, load_model
from everstep.engine.errors import ModelUnsupported
from everstep.engine.models import load
from tests.engine.conftest import GROUPED, SMALL, write_model
from tests.engine.helpers import examples, forward, random_adapter, sample_all

ORIGINAL = 32
LONG = 3 * ORIGINAL
HALF = 4
"""Frequencies of a head of width 8."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0 + 0.1 * index for index in range(HALF)],
    "long_factor": [2.0 + 1.5 * index for index in range(HALF)],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
}
CONFIGS: dict[str, Any] = {
    "phi3": AutoConfig.for_model(
        "phi3",
        **GROUPED,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=ORIGINAL,
    ),
    "minicpm3": AutoConfig.for_model("minicpm3", **LATENT, rope_parameters=LONGROPE),
    "phimoe": AutoConfig.for_model(
        "phimoe",
        **GROUPED,
        num_local_experts=4,
        sliding_window=None,
        rope_parameters={**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
    ),
    "llama-longrope": AutoConfig.for_model(
        "llama", **GROUPED, rope_parameters={**LONGROPE, "factor": 8.0}
    ),
    "qwen3-dynamic": AutoConfig.for_model(
        "qwen3",
        **{**GROUPED, "max_position_embeddings": 128},
        head_dim=8,
        rope_parameters=DYNAMIC,
    ),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("positions")
    return {n: write_model(root / n, config, tokenizer) for n, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def models(sources: dict[str, Path]) -> dict[str, Model]:
    return {n: load_model(n, str(source), device="cpu") for n, source in sources.items()}


def text(seed: int, length: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, length)


def logprobs(model: Model, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Compute the logprob of each token after the first, in one pass."""
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor(tokens).unsqueeze(0)))[0]
    every: np.ndarray[Any, Any] = torch.log_softmax(logits, -1).numpy()
    chosen: np.ndarray[Any, Any] = every[np.arange(len(tokens) - 1), tokens[1:]]
    return chosen


@FAMILIES
def test_sample_is_the_same_alone_and_beside_a_long_one(
    models: dict[str, Model], family: str
) -> None:
    model = models[family]
    adapter = None if model.mixes_rows else random_adapter(model, 1)
    mine = (SampleSpec(text(1, 9), max_tokens=12, seed=5, use_eos=False), adapter)
    alone = sample_all(model, [mine])[0].sequences[0]
    other = (SampleSpec(text(2, LONG), max_tokens=16, seed=6, use_eos=False), adapter)
    beside = sample_all(model, [other, mine])[1].sequences[0]
    again = sample_all(model, [mine])[0].sequences[0]  # after a long one
    for each in (beside, again):
        assert each.tokens.tolist() == alone.tokens.tolist()
        assert each.logprobs.tobytes() == alone.logprobs.tobytes()


@FAMILIES
def test_datum_has_the_same_logprobs_beside_a_long_one(
    models: dict[str, Model], family: str
) -> None:
    model = models[family]
    state = model.new_run(AdapterConfig(rank=4, train_mlp=False))
    data = examples(3, (ORIGINAL - 2, ORIGINAL + 6, LONG))  # the first two share a micro-batch
    together = forward(model, state, data).outputs
    for one, expected in zip(data, together, strict=True):
        alone = forward(model, state, [one]).outputs[0]["logprobs"]
        np.testing.assert_allclose(alone, expected["logprobs"], atol=1e-5)


@FAMILIES
def test_sequence_that_grows_beyond_the_original_length_follows_one_full_pass(
    models: dict[str, Model], family: str
) -> None:
    model = models[family]
    prompt = text(4, ORIGINAL - 5)
    spec = SampleSpec(prompt, max_tokens=LONG - ORIGINAL, seed=1, use_eos=False)
    sequence = sample_all(model, [(spec, None)])[0].sequences[0]
    tokens = np.concatenate([prompt, sequence.tokens])
    assert len(tokens) > 2 * ORIGINAL
    np.testing.assert_allclose(
        sequence.logprobs, logprobs(model, tokens)[len(prompt) - 1 :], atol=2e-5
    )


@pytest.mark.parametrize("family", ["phi3", "minicpm3", "llama-longrope", "qwen3-dynamic"])
def test_long_text_has_the_logits_of_transformers(
    models: dict[str, Model], sources: dict[str, Path], family: str
) -> None:
    base = AutoModelForCausalLM.from_pretrained(sources[family], attn_implementation="eager")
    tokens = torch.tensor(text(5, LONG)).unsqueeze(0)
    with torch.no_grad():
        theirs = base(tokens).logits
        ours = models[family].logits(models[family].hidden(tokens))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_context_within_the_original_length_takes_the_short_factors(
    sources: dict[str, Path], models: dict[str, Model], family: str
) -> None:
    short = load_model(family, str(sources[family]), device="cpu", context_length=ORIGINAL)
    base = AutoModelForCausalLM.from_pretrained(sources[family], attn_implementation="eager")
    tokens = torch.tensor(text(6, ORIGINAL)).unsqueeze(0)
    with torch.no_grad():
        theirs = base(tokens).logits
        ours = short.logits(short.hidden(tokens))
        other = models[family].logits(models[family].hidden(tokens))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((other - theirs).abs().max()) > 0.1
    assert short.info.max_context_length == ORIGINAL
    assert (short.info.rotary, models[family].info.rotary) == (
        "longrope, short factors",
        "longrope, long factors",
    )


def test_context_is_never_longer_than_the_models_own(sources: dict[str, Path]) -> None:
    model = load_model("phi3", str(sources["phi3"]), device="cpu", context_length=10**6)
    assert model.info.max_context_length == 256


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_probe_sees_a_model_that_follows_the_pass(
    sources: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "fix_frequencies", lambda module, length: "")
    with pytest.raises(ModelUnsupported, match="from the whole pass") as caught:
        load_model(family, str(sources[family]), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_that_scales_by_the_length_of_the_pass_is_refused(
    directories: dict[str, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = modeling_llama.LlamaRotaryEmbedding.forward

    def follow_the_pass(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cosine, sine = turn(self, x, position_ids)
        return cosine * (1 + position_ids.shape[1] / 8), sine

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", follow_the_pass)
    with pytest.raises(ModelUnsupported, match="gives"):
        load_model("llama", str(directories["llama"]), device="cpu", dtype=dtype)
