"""Compatibility: whether a checkpoint can be loaded into a run."""

from __future__ import annotations

from typing import Any

from everstep.ledger import Checkpoint
from everstep.ledger import Run as RunRecord
from everstep.runtime.errors import OperationFailed
from everstep.wire.errors import ErrorCategory

_LORA_FIELDS = ("rank", "alpha", "train_attn", "train_mlp", "train_unembed", "modules")


def check_compatible(checkpoint: Checkpoint, record: RunRecord) -> None:
    """Raise `OperationFailed` naming each field in which a checkpoint doesn't fit a run."""
    pairs: list[tuple[str, Any, Any]] = [
        ("base_model", checkpoint.base_model, record.base_model),
        *((field, checkpoint.lora.get(field), record.lora.get(field)) for field in _LORA_FIELDS),
    ]
    wrong = [
        f"checkpoint {field} is {theirs} but target model {field} is {ours}"
        for field, theirs, ours in pairs
        if theirs != ours
    ]
    if wrong:
        raise OperationFailed(
            "Checkpoint model configuration is incompatible with target model: "
            f"{'; '.join(wrong)}. Create a training client from the checkpoint instead.",
            ErrorCategory.USER,
        )
