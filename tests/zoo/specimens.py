"""Specimens: a tiny random model of a family, as files, loaded by the engine or refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from everstep.engine import AdapterConfig, Model, RunState, load_model
from everstep.engine.errors import ModelUnsupported
from tests.zoo.configs import tiny_config

_SHAKE = 0.1
"""Standard deviation of the noise on every weight: norms, biases and routers start out flat."""
_NUMBERS = re.compile(r" \(largest difference [^)]*\)")
_UNBUILT = "transformers can't build it here"


@dataclass(frozen=True)
class Specimen:
    """A family's model.

    Attributes:
        family: its model type.
        directory: files of the base model.
        architecture: class of the model; empty where transformers can't build it.
        model: as the engine loaded it. None where it was refused.
        reason: why it was refused.
    """

    family: str
    directory: Path
    architecture: str = ""
    model: Model | None = None
    reason: str = ""

    @property
    def served(self) -> Model:
        """The loaded model, of a family that is served."""
        assert self.model is not None, self.reason
        return self.model

    def run(self) -> RunState:
        """Create a run with all of a family's projections, whose adapter changes every logit."""
        mlp = bool(self.served.info.projections.mlp)
        state = self.served.new_run(AdapterConfig(rank=3, alpha=6.0, seed=5, train_mlp=mlp))
        noise = torch.Generator().manual_seed(11)
        state.arena.buffers["params"].normal_(0, 0.05, generator=noise)
        return state

    @property
    def row(self) -> str:
        """The family's row in the table of models."""
        if self.model is None:
            reason = self.reason.replace(str(self.directory), self.family)
            reason = " ".join(_NUMBERS.sub("", reason).replace("|", "\\|").split())
            return f"| `{self.family}` | {reason} |"
        found = self.model.info.projections
        never = "<br>".join(f"{kind}: {_forms(forms)}" for kind, forms in found.never.items())
        cells = (_forms(found.attention), _forms(found.mlp), _forms(found.unembed), never)
        return f"| `{self.family}` | {' | '.join(cells)} |"


def _forms(forms: Mapping[str, int]) -> str:
    """Name projections without the path that they share with all others."""
    return ", ".join(f"`{re.split(r'[.][*][.]', form)[-1]}`" for form in forms)


def specimen(family: str, directory: Path, tokenizer: Any) -> Specimen:
    """Build a family's model, write it and have the engine load it."""
    try:
        module = random_model(family)
    except Exception as error:  # noqa: BLE001  transformers' own, of any kind
        return Specimen(family, directory, reason=f"{_UNBUILT} ({type(error).__name__}).")
    module.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    name = type(module).__name__
    try:
        model = load_model(family, str(directory), device="cpu")
    except ModelUnsupported as error:
        return Specimen(family, directory, name, reason=str(error))
    return Specimen(family, directory, name, model)


def random_model(family: str) -> Any:
    """Build a family's tiny model with weights of which hardly any is zero or one."""
    noise = torch.Generator().manual_seed(1)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = AutoModelForCausalLM.from_config(tiny_config(family))
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(_SHAKE * torch.randn(tensor.shape, generator=noise))
    for table in module.modules():  # transformers may set a padding row to zero as it loads it
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            table.weight.data[table.padding_idx] = 0
    return module.eval()
