"""A tiny configuration of every causal family of transformers.

Widths are named alike in most families, so one table of them makes most configurations, and new
families need nothing. `OVERRIDES` holds what a family names otherwise or does not accept.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4_text-experts": {"model_type": "gemma4_text", "enable_moe_block": True},
    "granitemoeshared-tied": {"model_type": "granitemoeshared", "tie_word_embeddings": True},
}
"""Further forms of some families, with other modules."""
FAMILIES = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS)
EXPERTS = 6
"""Routed experts of a mixture. Nothing else in a tiny model is this wide."""
_WIDTHS = {
    32: "hidden_size n_embd d_model embedding_size embed_dim",
    48: """intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp
        ffn_hidden_size dff d_inner dim_ff dense_intermediate_size feed_forward_size""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_encoder_layers num_decoder_layers num_key_value_heads num_experts_per_tok moe_topk
        moe_k moe_top_k top_k_experts depth""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        qk_rope_head_dim linear_num_value_heads linear_num_heads linear_num_key_heads
        index_n_heads""",
    8: """head_dim sliding_window qk_nope_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim index_head_dim kv_channels global_head_dim""",
    10: "q_lora_rank kv_lora_rank",
    12: "v_head_dim",
    16: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size
        shared_experts_intermediate_size mamba_d_state ssm_state_size state_size""",
    EXPERTS: "num_experts num_local_experts n_routed_experts moe_num_experts",
    1: "n_group topk_group first_k_dense_replace num_dense_layers n_shared_experts n_groups",
    259: "vocab_size vocab_size_per_layer_input",
    256: "max_position_embeddings n_positions max_seq_len max_sequence_length",
}
_TINY: dict[str, Any] = {
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 0,
    "is_decoder": True,
    "initializer_range": 0.1,
    **{name: width for width, names in _WIDTHS.items() for name in names.split()},
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1}
_GEMMA4 = {"global_head_dim": 8}
_SHARED = {  # the last two layers use the keys and values of the first two
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "ple_layer_ids": [],
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_count": 2,
    "hc_lowrank": 4,
    "ngram_vocab_size_base": 50,
}
_VISION = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
_LATENT_FAMILIES = (
    "axk1",
    "axk2",
    "bailing_hybrid",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "hy_v4",
    "kimi_linear",
    "longcat_flash",
    "minicpm3",
    "youtu",
)
_LATENT = {"num_key_value_heads": 4}  # keys and values come from one latent, for every head
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LATENT_FAMILIES, _LATENT),
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "bloom": {"seq_length": 256},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "decoder_config": {"hidden_size_global": 32},
        "encoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "codegen": {"rotary_dim": 4},
    "cpmant": {"dim_head": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": 2, "ffn_hidden_size": 16},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1, "hc_mult": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]},
        "audio_config": None,
        "vision_config": None,
    },
    "dots3_note_text": {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]},
    "falcon_h1": _MAMBA,
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", **_VISION}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    "gemma4": {
        "text_config": {**_GEMMA4, "hidden_size_per_layer_input": 8},
        "vision_config": None,
        "audio_config": None,
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            **_GEMMA4,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            **_SHARED,
        },
        "backbone_hidden_size": 32,
    },
    "gemma4_text": {**_GEMMA4, "hidden_size_per_layer_input": 8},
    "gemma4_unified": {"text_config": _GEMMA4, "vision_config": None, "audio_config": None},
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text", **_GEMMA4, **_SHARED},
        "backbone_hidden_size": 32,
    },
    "gemma4_unified_text": _GEMMA4,
    "got_ocr2": {"text_config": {"model_type": "qwen2"}, "vision_config": {"output_channels": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["full_attention", "linear_attention"]},
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 8},
    "longcat_flash": {**_LATENT, "head_dim": 4, "num_layers": 1, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8},
    "phi4_multimodal": {
        "audio_config": {"num_blocks": 1, "nemo_conv_channels": 8, "ext_pw_out_channel": 32},
    },
    "phimoe": {"sliding_window": 256},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 10,
        "shape_embed_dim": 8,
        "shape_vocab_size": 10,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 16,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """Return a family's tiny configuration."""
    variant = dict(VARIANTS.get(model_type, {}))
    model_type = variant.pop("model_type", model_type)
    return _tiny(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}) | variant)


def _tiny(kind: Any, overrides: dict[str, Any]) -> PretrainedConfig:
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    values = {name: value for name, value in _TINY.items() if name in known} | overrides
    for name, part in kind.sub_configs.items():
        if overrides.get(name, {}) is None:
            continue
        chosen = dict(overrides.get(name, {}))
        own = CONFIG_MAPPING[chosen.pop("model_type")] if "model_type" in chosen else part
        if hasattr(own, "__dataclass_fields__"):
            values[name] = _tiny(own, chosen)
    config: PretrainedConfig = kind(**values)
    return config
