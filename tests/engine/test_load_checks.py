"""Load checks: right models of every precision pass, wrong ones don't, and refusals are short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from everstep.engine import AdapterConfig, Model, load_model
from everstep.engine.errors import ModelUnsupported
from everstep.engine.models import attention, load_checks
from everstep.engine.models.float32 import in_float32
from tests.engine.conftest import GROUPED, write_model
from tests.engine.helpers import trained
from tests.engine.test_reference import export

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {**GROUPED, "head_dim": 8, "tie_word_embeddings": False}
SEEING: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 8},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 250,
    },
    "qwen2_5_vl": {
        "text_config": {
            **GROUPED,
            "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 250,
    },
}


def write_seeing(directory: Path, family: str, tokenizer: Any) -> Path:
    """Write a tiny checkpoint that also sees."""
    config = CONFIG_MAPPING[family](**SEEING[family])
    torch.manual_seed(7)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", SEEING)
def test_language_model_of_a_checkpoint_that_sees_is_served(
    family: str, tmp_path: Path, tokenizer: Any
) -> None:
    source = write_seeing(tmp_path / family, family, tokenizer)
    model = load_model(family, str(source), device="cpu")
    names = [name for name, _ in model.module.named_parameters()]
    assert names and not any("vision" in name or "visual" in name for name in names)
    assert model.info.max_context_length == GROUPED["max_position_embeddings"]
    state = trained(model)
    export(state, tmp_path / "adapter")
    whole = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    peft = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    tokens = torch.tensor([[5, 9, 1, 7, 3]])
    with torch.no_grad(), model.bind_weights(state.layout, state.leaves()):
        ours = model.logits(model.hidden(tokens))
        theirs = peft(input_ids=tokens).logits
        plain = model.module(tokens, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen2_moe", {"sliding_window": 8, "use_sliding_window": False}),
        ("qwen2_moe", {"sliding_window": 8}),
        ("phimoe", {"sliding_window": 256}),
    ],
)
def test_mask_that_no_layer_uses_refuses_no_model(
    family: str, more: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    config = CONFIG_MAPPING[family](
        **GROUPED,
        **more,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    source = write_model(tmp_path / "model", config, tokenizer)
    assert load_model(family, str(source), device="cpu").info.max_context_length == 256


def test_probe_is_text_of_the_tokenizer(llama: Model) -> None:
    tokens = load_checks.probe_tokens(llama.tokenizer, llama.info)
    text = llama.tokenizer.decode(tokens[0])
    assert load_checks._TEXT.startswith(text) and len(text) > 1


def rough(config: PretrainedConfig, directory: Path, tokenizer: Any) -> Path:
    """A model whose attention in bfloat16 is chaotic: rounding changes which key wins."""
    torch.manual_seed(3)
    module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12.0)
    module.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_model_whose_rounding_is_rough_is_served_in_half_precision(
    tmp_path: Path, tokenizer: Any
) -> None:
    config = CONFIG_MAPPING["llama"](**{**GROUPED, "num_hidden_layers": 4})
    source = str(rough(config, tmp_path / "rough", tokenizer))
    model = load_model("rough", source, device="cpu", dtype="bfloat16")
    tokens = load_checks.probe_tokens(tokenizer, model.info)
    own = load_checks._eager_logits(model.module, tokens)
    with in_float32(model.module):
        exact = load_checks._eager_logits(model.module, tokens)
    rounding = float((own - exact).abs().max() / exact.abs().max())
    assert rounding > 0.1, "the model of this test is too smooth"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slightly_wrong_attention_is_found_in_each_precision(
    directories: dict[str, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = attention._causal
    monkeypatch.setattr(attention, "_causal", lambda q, k, v, s: exact(1.02 * q, k, v, s))
    with pytest.raises(ModelUnsupported, match="transformers' own attention"):
        load_model("llama", str(directories["llama"]), device="cpu", dtype=dtype)


def test_float32_pass_equals_a_float32_copy_and_leaves_the_weights(
    directories: dict[str, Path],
) -> None:
    source = str(directories["qwen3-tied"])
    half = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    before = {name: (p.data_ptr(), p.clone()) for name, p in half.named_parameters()}
    tokens = torch.tensor([[5, 9, 1, 7, 3]])
    with torch.no_grad(), in_float32(half):
        exact = half(tokens).logits
        with pytest.raises(IndexError):
            half(tokens + 1000)
    assert exact.dtype == torch.float32
    assert before
    for name, parameter in half.named_parameters():
        assert (parameter.dtype, parameter.data_ptr()) == (torch.bfloat16, before[name][0])
        assert torch.equal(parameter, before[name][1])
    with torch.no_grad():
        torch.testing.assert_close(exact, half.float()(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "t5"}, "'t5' is not a causal language model"),
        ({"model_type": "resnet", "architectures": ["ResNet"]}, "ResNet is not a causal"),
        ({"model_type": "unheard-of"}, "configuration of"),
        ({"model_type": "llama", "num_attention_heads": "many"}, "can't be"),
    ],
)
def test_refusal_is_one_line_that_names_the_model(
    content: dict[str, Any], words: str, tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelUnsupported) as caught:
        load_model("strange", str(tmp_path), device="cpu")
    text = str(caught.value)
    assert words in text
    assert "\n" not in text and len(text) < 300, text


def test_adapter_of_a_seeing_model_has_the_names_of_the_checkpoint(
    tmp_path: Path, tokenizer: Any
) -> None:
    source = write_seeing(tmp_path / "seeing", "gemma3", tokenizer)
    model = load_model("seeing", str(source), device="cpu")
    names = list(model.layout(AdapterConfig(rank=2)).widths)
    assert any(name.startswith("model.language_model.layers.0.") for name in names)
