"""Model families: each one computes the same as transformers, or is rejected when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from everstep.engine import AdamParams, AdapterConfig, Model, SampleSpec, load_model, optim_step
from everstep.engine.errors import InputError, ModelUnsupported
from everstep.engine.models import attention
from everstep.engine.models.kv_cache import KvCache
from everstep.engine.run_state import Adapter
from tests.engine.conftest import GROUPED, SMALL, WINDOW, write_model
from tests.engine.helpers import (
    adapter,
    backward,
    examples,
    forward,
    random_adapter,
    sample,
    sample_all,
)

LONG = 5 * WINDOW
MIXTURE = AdapterConfig(rank=4, train_mlp=False)


def config(kind: str, **values: Any) -> Any:
    return AutoConfig.for_model(kind, **values)


def uncached(model: Model, used: Adapter | None, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Compute the logprobs after every position in one pass without a cache."""
    with torch.no_grad(), model.binding.bind(*([used.bind()] if used else [])):
        hidden = model.hidden(torch.tensor(tokens).unsqueeze(0))
        logprobs: np.ndarray[Any, Any] = torch.log_softmax(model.logits(hidden)[0], -1).numpy()
        return logprobs


def test_logits_equal_transformers_eager_attention(
    family: str, model: Model, directories: dict[str, Path]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(
        directories[family], dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, LONG)))
    with torch.no_grad():
        theirs = base(tokens).logits
        assert torch.allclose(model.logits(model.hidden(tokens)), theirs, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss(model: Model) -> None:
    state = model.new_run(AdapterConfig(rank=4))
    data = examples(1, (LONG, 7))
    first = forward(model, state, data).metrics["loss:sum"]
    for _ in range(8):
        backward(model, state, data)
        optim_step(state, AdamParams(learning_rate=0.03))
    assert forward(model, state, data).metrics["loss:sum"] < 0.8 * first


@pytest.mark.parametrize("adapted", [False, True])
def test_sampling_with_a_cache_follows_the_uncached_forward(model: Model, adapted: bool) -> None:
    used = random_adapter(model, 1) if adapted else None
    prompt = np.random.default_rng(2).integers(0, 256, 11)
    spec = SampleSpec(prompt, 3, max_tokens=LONG, use_eos=False, prompt_logprobs=True, seed=1)
    output = sample(model, spec, used)
    for sequence in output.sequences:
        tokens = [*prompt.tolist(), *sequence.tokens.tolist()]
        logprobs = uncached(model, used, tokens)
        expected = logprobs[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(sequence.logprobs, expected[len(prompt) - 1 :], atol=2e-5)
        assert output.prompt_logprobs is not None
        np.testing.assert_allclose(
            output.prompt_logprobs[1:], expected[: len(prompt) - 1], atol=2e-5
        )
    assert len({tuple(s.tokens.tolist()) for s in output.sequences}) == 3


def test_the_flags_select_the_adapted_projections(model: Model) -> None:
    def names(kind: str) -> set[str]:
        config = AdapterConfig(
            2, train_attn=kind == "attn", train_mlp=kind == "mlp", train_unembed=kind == "unembed"
        )
        return set(model.layout(config).widths)

    attn, mlp, head = names("attn"), names("mlp"), names("unembed")
    assert len(attn) >= 2
    assert len(mlp) >= 2
    assert all("attn" in name or "attention" in name for name in attn)
    assert all("mlp" in name for name in mlp)
    assert len(head) == 1
    assert attn | mlp | head == set(model.layout(AdapterConfig(rank=2)).widths)
    assert {len(attn) % 2, len(mlp) % 2} == {0}, "both layers"


# Models that are rejected

REJECTED: dict[str, tuple[Any, str]] = {
    "attention of its own": (
        config("gptj", vocab_size=259, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        "has attention of its own, which the engine can't replace",
    ),
    "local attention of its own": (
        config(
            "gpt_neo",
            vocab_size=259,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
        ),
        "has attention of its own, which the engine can't replace",
    ),
    "position biases in a mask": (
        config(
            "bloom",
            vocab_size=259,
            hidden_size=32,
            n_layer=2,
            n_head=4,
            max_position_embeddings=64,
        ),
        "Bloom",
    ),
    "a context of unknown length": (
        config("bloom", vocab_size=259, hidden_size=32, n_layer=2, n_head=4),
        "the length of its context",
    ),
    "attention sinks": (
        config("gpt_oss", **GROUPED, head_dim=8, num_local_experts=2),
        "sinks",
    ),
    "chunks": (
        config(
            "llama4_text",
            **GROUPED,
            head_dim=8,
            intermediate_size_mlp=64,
            num_local_experts=2,
            attention_chunk_size=8,
        ),
        "masks its attention",
    ),
    "both directions": (
        config("gemma3_text", **GROUPED, head_dim=8, use_bidirectional_attention=True),
        "masks its attention",
    ),
    "a convolution's state": (
        config("lfm2", **GROUPED, layer_types=["conv", "full_attention"]),
        "2 layers, and 1 of them",
    ),
    "no attention at all": (
        config("mamba", vocab_size=259, hidden_size=32, num_hidden_layers=2),
        "no attention projections",
    ),
    "a head with a transform": (
        config("bert", **SMALL, is_decoder=True),
        "computes its logits",
    ),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_an_unsupported_family_is_rejected(reason: str, tmp_path: Path, tokenizer: Any) -> None:
    chosen, words = REJECTED[reason]
    source = str(write_model(tmp_path / "model", chosen, tokenizer))
    with pytest.raises(ModelUnsupported) as caught:
        load_model("strange", source, device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_with_a_wrong_cache_is_rejected(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KvCache, "append", lambda self, layer, key, value: (key, value))
    with pytest.raises(ModelUnsupported, match="cached keys and values"):
        load_model("llama", str(directories["llama"]), device="cpu")


def test_a_model_with_different_attention_is_rejected(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = attention._causal
    monkeypatch.setattr(attention, "_causal", lambda q, k, v, s: exact(1.5 * q, k, v, s))
    with pytest.raises(ModelUnsupported, match="transformers' own attention"):
        load_model("llama", str(directories["llama"]), device="cpu")


@pytest.mark.parametrize(
    "special",
    [
        {"attention_mask": torch.zeros(1, 1, 3, 3)},
        {"attention_mask": None, "is_causal": False},
        {"attention_mask": None, "s_aux": torch.zeros(4)},
        {"attention_mask": None, "position_bias": torch.zeros(1, 4, 3, 3)},
    ],
    ids=str,
)
def test_attention_that_is_not_only_causal_is_rejected(special: dict[str, Any]) -> None:
    rows = torch.ones(1, 4, 3, 8)
    with pytest.raises(ModelUnsupported, match="not supported"):
        attention.attend(torch.nn.Module(), rows, rows, rows, **special)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises((OSError, ModelUnsupported), match=tmp_path.name):
        load_model("nothing", str(tmp_path), device="cpu")


# Mixtures of experts, and keys wider than values


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Model:
    """A model with DeepSeek's attention and experts."""
    chosen = config(
        "deepseek_v3",
        **SMALL,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    )
    source = write_model(tmp_path_factory.mktemp("mixture") / "model", chosen, tokenizer)
    return load_model("mixture", str(source), device="cpu")


def test_a_mixture_of_experts_samples_as_it_scores(mixture: Model) -> None:
    state = mixture.new_run(MIXTURE)
    backward(mixture, state, examples(1))
    optim_step(state, AdamParams(learning_rate=0.1))
    used = adapter(mixture, state)
    spec = SampleSpec(np.arange(1, 9), 3, max_tokens=20, use_eos=False)
    for sequence in sample(mixture, spec, used).sequences:
        tokens = [*range(1, 9), *sequence.tokens.tolist()]
        logprobs = uncached(mixture, used, tokens)
        expected = logprobs[np.arange(7, len(tokens) - 1), tokens[8:]]
        np.testing.assert_allclose(sequence.logprobs, expected, atol=2e-5)


def test_a_mixture_of_experts_samples_the_same_bits_alone_and_among_others(mixture: Model) -> None:
    requests: list[tuple[SampleSpec, Adapter | None]] = [
        (SampleSpec(np.arange(1, 5 + i), 1 + i % 3, max_tokens=6, seed=i), None) for i in range(6)
    ]
    together = sample_all(mixture, requests)
    for (spec, used), among in zip(requests, together, strict=True):
        alone = sample(mixture, spec, used)
        assert alone.sequences
        for one, other in zip(alone.sequences, among.sequences, strict=True):
            assert one.tokens.tobytes() == other.tokens.tobytes()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_a_flag_for_missing_projections_is_named(tmp_path: Path, tokenizer: Any) -> None:
    chosen = config("mixtral", **GROUPED, num_local_experts=2)
    source = str(write_model(tmp_path / "model", chosen, tokenizer))
    mixtral = load_model("mixtral", source, device="cpu")
    with pytest.raises(InputError, match=r"train_mlp is True.*set it to False"):
        mixtral.new_run(AdapterConfig(rank=4))
    assert mixtral.new_run(MIXTURE).arena.size
