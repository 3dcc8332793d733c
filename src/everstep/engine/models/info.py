"""Model info: the description of a served base model. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Forms = Mapping[str, int]
"""Counts of projections by the form of their names, with ``*`` for the number of a layer."""


@dataclass(frozen=True)
class Projections:
    """A model's projections, by the flag that selects them for an adapter.

    Attributes:
        attention: those of ``train_attn``.
        mlp: those of ``train_mlp``.
        unembed: the output head.
        never: projections that no flag selects, by kind: routed experts, routers and others.
        peft_parameters: last names of projections that PEFT must find in ``target_parameters``,
            since it takes them in ``target_modules`` for routed experts.
        peft_lost: forms of the projections whose tensors PEFT can't load.
    """

    attention: Forms = field(default_factory=dict)
    mlp: Forms = field(default_factory=dict)
    unembed: Forms = field(default_factory=dict)
    never: Mapping[str, Forms] = field(default_factory=dict)
    peft_parameters: Sequence[str] = ()
    peft_lost: Sequence[str] = ()


def count_forms(names: Iterable[str]) -> dict[str, int]:
    """Count names by their form."""
    counts: dict[str, int] = {}
    for name in names:
        form = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        counts[form] = counts.get(form, 0) + 1
    return counts


@dataclass(frozen=True)
class ModelInfo:
    """Description of a served base model.

    Attributes:
        name: name that clients use.
        source: directory or hub id that it was loaded from.
        architecture: class of the model.
        vocab_size: upper bound of token ids, exclusive.
        max_context_length: maximum tokens of a sequence.
        fingerprint: BLAKE3 of configuration and weights.
        eos_token_ids: tokens that end a text.
        tokenizer_id: directory or hub id of the tokenizer.
        device: torch device.
        dtype: dtype of the base weights.
        rotary: the factors that the context's length chose for its positions, see `rotary`.
        projections: those that adapters of the model can adapt, and the others.
        decoder: what computes its decoding passes, see `decoder`.
        layers: what computes its training passes, see `training.layers`.
    """

    name: str
    source: str
    architecture: str
    vocab_size: int
    max_context_length: int
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    tokenizer_id: str
    device: str
    dtype: str
    rotary: str = ""
    projections: Projections = Projections()
    decoder: str = "transformers"
    layers: str = "transformers"

    def environment(self) -> dict[str, Any]:
        """Return the model's part of the numeric environment."""
        return {
            "dtype": self.dtype,
            "model_device": self.device.partition(":")[0],
            "rotary": self.rotary,
            "decoder": self.decoder,
            "layers": self.layers,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelInfo:
        """Create it from the fields of `to_dict`. Unknown ones are ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known["eos_token_ids"] = tuple(known["eos_token_ids"])
        found = {**known.get("projections", {})}
        for names in ("peft_parameters", "peft_lost"):
            found[names] = tuple(found.get(names, ()))
        known["projections"] = Projections(**found)
        return cls(**known)
