"""Rotary embeddings: fixes those whose frequencies would follow the pass.

transformers chooses the frequencies of two types of rotary embeddings by the largest position of
the pass: ``longrope`` takes its short factors up to the original length and its long ones beyond,
``dynamic`` stretches the base with the length. A row would depend on the rows beside it, and keys
that were cached before the change would disagree with those after it. Here they are chosen once,
by the longest sequence that is served, as vLLM does.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_FIXED = "fixed"
"""A type that transformers does not know, and so doesn't update."""


def fix_frequencies(module: nn.Module, context_length: int) -> str:
    """Choose the frequencies of every rotary embedding that would choose them by the pass.

    Args:
        module: the model.
        context_length: tokens of the longest sequence that is served.

    Returns:
        The chosen factors, for the numeric environment. Empty where the pass chooses nothing.
    """
    chosen: set[str] = set()
    for rotary in module.modules():
        types = getattr(rotary, "rope_type", None)
        if isinstance(types, str) and _follows_the_pass(types):
            chosen.add(_fix(rotary, types, None, context_length))
            rotary.rope_type = _FIXED  # type: ignore[assignment]  # no parameter or module
        elif isinstance(types, dict):
            for layer_type, kind in types.items():
                if isinstance(kind, str) and _follows_the_pass(kind):
                    chosen.add(_fix(rotary, kind, layer_type, context_length))
                    rotary.rope_type = {**rotary.rope_type, layer_type: _FIXED}  # type: ignore
    return ", ".join(sorted(chosen))


def _follows_the_pass(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _fix(rotary: Any, kind: str, layer_type: str | None, context_length: int) -> str:
    """Set a rotary embedding's frequencies. Returns their description."""
    own = {} if layer_type is None else {"layer_type": layer_type}
    prefix = "" if layer_type is None else f"{layer_type}_"
    old: torch.Tensor = getattr(rotary, f"{prefix}inv_freq")
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
        rotary.config, old.device, seq_len=context_length, **own
    )
    rotary.register_buffer(f"{prefix}inv_freq", frequencies.to(old.device), persistent=False)
    setattr(rotary, f"{prefix}attention_scaling", scaling)
    if kind != "longrope":
        return f"{kind} for {context_length}"
    parameters = rotary.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    is_long = context_length > parameters["original_max_position_embeddings"]
    if "long_mscale" in parameters and hasattr(rotary, "rope_init_fn"):
        _fix_scale(rotary, "long_mscale" if is_long else "short_mscale", frequencies, scaling)
    return f"{kind}, {'long' if is_long else 'short'} factors"


def _fix_scale(rotary: Any, chosen: str, frequencies: torch.Tensor, scaling: float) -> None:
    """Fix the frequencies and the scale, one of two, that Phi-3.5-MoE computes in every pass."""
    rotary.rope_init_fn = lambda config: (frequencies, scaling)
    rotary.config = copy.deepcopy(rotary.config)  # the model's own stays as published
    parameters = rotary.config.rope_parameters
    parameters["short_mscale"] = parameters["long_mscale"] = parameters[chosen]
