"""Bringing checkpoints in that were made elsewhere; a call of Everstep's own.

The body of the request is a tar: adapter_config.json and adapter_model.safetensors as PEFT writes
them; of another Everstep service optimizer.safetensors, gradients.safetensors and manifest.json
too.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Literal

from pydantic import Field

from everstep.wire.base import Request, Response

_COLLECTIONS = uuid.UUID("0d1d9c1e-9a7b-4b7e-8d0f-6a3c0b7f5e21")


def collection_run_id(collection: str) -> str:
    """The run that holds the imports of a collection."""
    return f"{uuid.uuid5(_COLLECTIONS, collection)}:train:0"


class ImportQuery(Request):
    """What an import becomes.

    Attributes:
        name: of the checkpoint.
        kind: what it is for.
        base_model: what it was trained on, where its configuration doesn't say that, or calls the
            model otherwise than the service does.
        source: where it comes from, as its lineage has it.
        collection: imports with the same text are checkpoints of one run; None: one of its own.
        saved_at: when it was saved there.
        step: how many optimizer steps it has seen, where its files don't say.
        overwrite: replace one of that name in the collection.
        user_metadata: a JSON object of texts; None: what its manifest says, if it has one.
    """

    name: str = "imported"
    kind: Literal["training", "sampler"] = "training"
    base_model: str | None = None
    source: str | None = Field(default=None, max_length=2000)
    collection: str | None = Field(default=None, max_length=2000)
    saved_at: datetime | None = None
    step: int = Field(default=0, ge=0)
    overwrite: bool = False
    user_metadata: str | None = Field(default=None, max_length=16_000)


class ImportResponse(Response):
    """What came of an import.

    Attributes:
        tinker_path: of the checkpoint.
        size_bytes: of its files.
        step: how many optimizer steps it has seen, as far as that is known.
        has_optimizer: whether it can be loaded with its optimizer state.
        is_new: False for one that had been imported before.
        notes: what about it is not as it was where it comes from.
    """

    tinker_path: str
    size_bytes: int
    step: int
    has_optimizer: bool
    is_new: bool
    notes: list[str]
