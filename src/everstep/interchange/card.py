"""A model card: README.md of what is exported, with where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

CARD = "README.md"
_ON_A_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""What a hub takes for a model's id; it refuses a card that says anything else there."""


@dataclass(frozen=True)
class Lineage:
    """Where a checkpoint comes from, as far as that is known.

    Attributes:
        path: its ``tinker://`` path.
        base_model: the base model's name.
        base_fingerprint: hash of the base model's configuration and weights.
        base_dtype: torch's name of the dtype that it was served in, of which that is a hash.
        step: how many optimizer steps it has seen.
        created_at: when it was saved.
        parents: what it descends from.
        imported_from: where it was brought in from, if it was.
        lora: rank, alpha, seed, what it is put on.
        optimizer: the optimizer's family.
        user_metadata: the user's.
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
    """The card's text.

    Args:
        lineage: of the checkpoint.
        merged_as: dtype of the merged model; None: the adapter itself.
    """
    # JSON is YAML, and quotes what YAML would read as something else
    known = {"base_model": lineage.base_model} if _ON_A_HUB.fullmatch(lineage.base_model) else {}
    head = {
        **known,
        "library_name": "transformers" if merged_as else "peft",
        "tags": ["everstep", "lora"] + (["merged"] if merged_as else []),
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    name = lineage.path.rsplit("/", 1)[-1]
    what = (
        f"The base model with the adapter merged into its weights, in {merged_as}: W + (alpha / "
        "rank) B A, added in float32. Load it with transformers; no PEFT is needed."
        if merged_as
        else "A LoRA adapter in PEFT's format, to be put on the base model."
    )
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in _facts(lineage))
    return f"---\n{front}\n---\n\n# {name}\n\n{what}\n\n## Lineage\n\n| | |\n|---|---|\n{rows}\n"


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
    """Text that stays in its cell."""
    return " ".join(text.replace("|", "\\|").split())
