"""Which projections of a model are attention, MLP and output head."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from everstep.engine.errors import ModelUnsupported

_ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*)(\.|$)")
_MLP = re.compile(r"(^|\.)(\w*mlp\w*|\w*ffn\w*|\w*feed_forward\w*|fc1|fc2)(\.|$)")


@dataclass(frozen=True)
class Targets:
    """Names of the projections by the flag that selects them, in the model's order."""

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    unembed: tuple[str, ...]


def find_targets(model: PreTrainedModel) -> Targets:
    """Return the projections of a causal language model that LoRA can be put on.

    Raises:
        ModelUnsupported: it has no attention projections, or no output head.
    """
    head = model.get_output_embeddings()
    attn, mlp, unembed = [], [], []
    for name, module in model.named_modules():
        if module is head:
            unembed.append(name)
        elif isinstance(module, nn.Linear | Conv1D):
            if _ATTENTION.search(name):
                attn.append(name)
            elif _MLP.search(name) and not _is_router(name):
                mlp.append(name)
    if not attn or not unembed:
        raise ModelUnsupported(
            f"{type(model).__name__} has no {'attention' if not attn else 'output'} projections "
            "that LoRA could be put on."
        )
    return Targets(tuple(attn), tuple(mlp), tuple(unembed))


def _is_router(name: str) -> bool:
    """A mixture's router is not adapted: its choices would no longer be the base's."""
    last = name.rsplit(".", 1)[-1]
    return last in ("gate", "router", "shared_expert_gate")
