"""A PEFT reference: an exported adapter, loaded by PEFT on transformers' own model, and trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from everstep.engine import AdamParams, RunState
from everstep.engine.run_state import module_name
from everstep.wire.messages.passes import Example
from tests.engine.helpers import files

Arrays = list[np.ndarray[Any, Any]]


def base_model(directory: Path) -> Any:
    """Load a base model as transformers computes it, without our attention."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def write_adapter(state: RunState, directory: Path) -> Path:
    """Write a run's adapter as the service saves it."""
    directory.mkdir(parents=True)
    for name, data in files(state, optimizer=False)[0].items():
        (directory / name).write_bytes(data)
    return directory


class PeftReference:
    """An adapter in PEFT.

    Args:
        base: the base model, which is changed.
        adapter: directory of the adapter.

    Attributes:
        model: the model with the adapter.
        unplaced: tensors of the adapter that PEFT did not find in the file, or could not place.
    """

    def __init__(self, base: Any, adapter: Path) -> None:
        self.model = PeftModel(base, PeftConfig.from_pretrained(adapter))
        report = self.model.load_adapter(str(adapter), "default", is_trainable=True)
        missing = [name for name in report.missing_keys if "lora_" in name]
        self.unplaced = [*missing, *report.unexpected_keys]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        self.model.eval()

    def loss(self, data: Sequence[Example]) -> torch.Tensor:
        """Compute the weighted sum of the negative logprobs, as the engine's cross entropy."""
        weighted = zip(logprobs(self.model, data), data, strict=True)
        return torch.stack(
            [-(each @ torch.from_numpy(one.inputs["weights"])) for each, one in weighted]
        ).sum()

    def tensors(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return the adapter's parameters by module and side."""
        return {
            (module_name(name), name.rsplit(".lora_", 1)[1][0]): parameter
            for name, parameter in self.model.named_parameters()
            if "lora_" in name
        }

    def optimizer(self, params: AdamParams) -> torch.optim.AdamW:
        """Create torch's AdamW with the engine's parameters."""
        return torch.optim.AdamW(
            self.tensors().values(),
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )


def logprobs(model: Any, data: Sequence[Example]) -> list[torch.Tensor]:
    """Compute the targets' logprobs, a text at a time."""
    found = []
    for one in data:
        logits = model(torch.from_numpy(one.tokens)[None]).logits.float()
        targets = torch.from_numpy(one.inputs["target_tokens"])[None, :, None]
        found.append(torch.log_softmax(logits, -1).gather(-1, targets)[0, :, 0])
    return found


def base_logprobs(model: Any, data: Sequence[Example]) -> Arrays:
    """As `logprobs`, as arrays."""
    with torch.no_grad():
        return [each.numpy() for each in logprobs(model, data)]
