"""Checkpoint import, an extension of Everstep.

The body of the request is a tar with adapter_config.json and adapter_model.safetensors as PEFT
writes them. From another Everstep service it also has optimizer.safetensors,
gradients.safetensors and manifest.json.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Literal

from pydantic import Field

from everstep.wire.base import Request, Response

_COLLECTIONS = uuid.UUID("0d1d9c1e-9a7b-4b7e-8d0f-6a3c0b7f5e21")


def collection_run_id(collection: str) -> str:
    """Return the id of the run that holds the imports of a collection."""
    return f"{uuid.uuid5(_COLLECTIONS, collection)}:train:0"


class ImportQuery(Request):
    """Properties of an imported checkpoint.

    Attributes:
        name: the checkpoint's name.
        kind: the checkpoint's kind.
        base_model: its base model, if its configuration doesn't name it or names it differently
            from the service.
        source: its origin, for its lineage.
        collection: imports of the same collection are checkpoints of one run. None makes a new
            run.
        saved_at: when it was saved at its origin.
        step: its number of optimizer steps, if its files don't say.
        overwrite: whether to replace a checkpoint of that name in the collection.
        user_metadata: a JSON object of strings, or None for that of its manifest, if it has one.
    """

    name: str = "imported"
    kind: Literal["training", "sampler"] = "training"
    base_model: str | None = None
    source: str | None = Field(default=None, max_length=2000)
    collection: str | None = Field(default=None, max_length=2000)
    saved_at: datetime | None = None
    step: int = Field(default=0, ge=0, lt=2**63)
    overwrite: bool = False
    user_metadata: str | None = Field(default=None, max_length=16_000)


class ImportResponse(Response):
    """An imported checkpoint.

    Attributes:
        tinker_path: the checkpoint's path.
        size_bytes: the size of its files.
        step: its number of optimizer steps, as far as it is known.
        has_optimizer: whether it can be loaded with its optimizer state.
        is_new: False if it had been imported before.
        notes: its differences from the original.
    """

    tinker_path: str
    size_bytes: int
    step: int
    has_optimizer: bool
    is_new: bool
    notes: list[str]
