"""OpenAI models: base models by name and checkpoints by path."""

from __future__ import annotations

import time
from typing import Literal

from everstep.ledger import Checkpoint
from everstep.runtime import OperationFailed, Rejected, Runtime
from everstep.wire import types
from everstep.wire.base import Response
from everstep.wire.paths import CheckpointKind

_PAGE = 1000
_STARTED = int(time.time())
_SAMPLED_FROM = (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)


class Model(Response):
    """A base model or checkpoint that text can be sampled from.

    Attributes:
        id: a base model's name, or a checkpoint's path.
        created: when the checkpoint was saved or, for a base model, this service was started, in
            seconds since 1970.
        parent: a checkpoint's base model.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "everstep"
    parent: str | None = None


class ModelList(Response):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


async def list_models(runtime: Runtime) -> ModelList:
    """Return the base models, then the checkpoints, newest first."""
    await runtime.loaded()
    found = [Model(id=info.name, created=_STARTED) for info in runtime.models]
    offset = 0
    while True:
        page = await runtime.run_queries.user_checkpoints(_PAGE, offset, _SAMPLED_FROM)
        found += [_model(each) for each in page.checkpoints]
        offset += _PAGE
        if len(page.checkpoints) < _PAGE:
            return ModelList(data=found)


async def get_model(runtime: Runtime, model: str) -> Model:
    """Return a model by its id, or raise `Rejected` (404) for an unknown one."""
    await runtime.loaded()
    for info in runtime.models:
        if info.name == model:
            return Model(id=model, created=_STARTED)
    try:
        return _model(await runtime.catalog.find(model))
    except OperationFailed as failure:
        raise Rejected(404, f"{failure.message} GET /v1/models lists what is here.") from failure


def _model(checkpoint: types.Checkpoint | Checkpoint) -> Model:
    if isinstance(checkpoint, Checkpoint):
        path, at = checkpoint.path, checkpoint.created_at
    else:
        path, at = checkpoint.tinker_path, checkpoint.time
    return Model(id=path, created=int(at.timestamp()), parent=checkpoint.base_model)
