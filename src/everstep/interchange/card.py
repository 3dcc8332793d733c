"""Model card: the README.md of an export, with the checkpoint's lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""Form of a model's id on the hub, which rejects cards with any other base model."""


@dataclass(frozen=True)
class Lineage:
    """A checkpoint's origin, as far as it is known.

    Attributes:
        path: its ``tinker://`` path.
        base_model: name of the base model.
        base_fingerprint: hash of the base model's configuration and weights.
        base_dtype: torch's name of the dtype in which the model was served and hashed.
        step: number of optimizer steps.
        created_at: time of the save.
        parents: checkpoints that it descends from.
        imported_from: source of an import.
        lora: rank, alpha, seed and adapted projections.
        optimizer: family of the optimizer.
        user_metadata: the user's metadata.
        files: BLAKE3 of its files by name.
    """

    path: str
    base_model: str
    base_fingerprint: str | None = None
    base_dtype: str | None = None
    step: int | None = None
    created_at: datetime | None = None
    parents: Sequence[str] = ()
    imported_from: str | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    user_metadata: Mapping[str, str] | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def model_card(lineage: Lineage, merged_as: str | None) -> str:
    """Render the card.

    Args:
        lineage: lineage of the checkpoint.
        merged_as: dtype of the merged model. None for the adapter itself.
    """
    # JSON is valid YAML and quotes text that YAML would interpret.
    base_model = {"base_model": lineage.base_model} if _HUB_ID.fullmatch(lineage.base_model) else {}
    head = {
        **base_model,
        "library_name": "transformers" if merged_as else "peft",
        "tags": ["everstep", "lora"] + (["merged"] if merged_as else []),
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    name = lineage.path.rsplit("/", 1)[-1]
    summary = (
        f"The base model with the adapter merged into its weights, in {merged_as}: W + (alpha / "
        "rank) B A, added in float32. Load it with transformers; no PEFT is needed."
        if merged_as
        else "A LoRA adapter in PEFT's format, to be put on the base model."
    )
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in _facts(lineage))
    return f"---\n{front}\n---\n\n# {name}\n\n{summary}\n\n## Lineage\n\n| | |\n|---|---|\n{rows}\n"


def _facts(lineage: Lineage) -> list[tuple[str, str]]:
    facts: list[tuple[str, Any]] = [
        ("base model", lineage.base_model),
        ("base model's fingerprint", lineage.base_fingerprint),
        ("base model's dtype", lineage.base_dtype),
        ("run", lineage.path.removeprefix("tinker://").split("/", 1)[0]),
        ("checkpoint", lineage.path),
        ("step", lineage.step),
        ("saved", lineage.created_at.isoformat() if lineage.created_at else None),
        ("parents", ", ".join(lineage.parents) or None),
        ("imported from", lineage.imported_from),
        *((f"LoRA {key}", _text(value)) for key, value in sorted(lineage.lora.items())),
        ("optimizer", _text(lineage.optimizer) if lineage.optimizer else None),
        *((f"`{key}`", value) for key, value in sorted((lineage.user_metadata or {}).items())),
        *((f"BLAKE3 of {name}", digest) for name, digest in sorted(lineage.files.items())),
    ]
    return [(key, str(value)) for key, value in facts if value is not None]


def _text(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    """Escape text for a table cell."""
    return " ".join(text.replace("|", "\\|").split())
