"""What is known of a base model. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """A base model that is served.

    Attributes:
        name: as clients call it.
        source: directory or hub id that it was loaded from.
        architecture: the model's class.
        vocab_size: token ids are below it.
        max_context_length: most tokens of a sequence.
        fingerprint: BLAKE3 of configuration and weights.
        eos_token_ids: tokens that end a text.
        tokenizer_id: where the tokenizer is: a directory or hub id.
        device: torch device.
        dtype: dtype of the base weights.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelInfo:
        """From the fields of `to_dict`; others are ignored."""
        known = {field: values[field] for field in cls.__dataclass_fields__}
        return cls(**{**known, "eos_token_ids": tuple(known["eos_token_ids"])})
