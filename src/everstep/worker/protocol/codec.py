"""Codec: encodes messages for the socket between the service and a worker.

On the socket a message is a JSON header, and a body for the field called ``body``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from everstep.engine.models.info import ModelInfo
from everstep.spool import Data
from everstep.vault import CheckpointId
from everstep.wire.messages.streams import DrawnTokens
from everstep.worker.protocol import messages
from everstep.worker.protocol.stored_request import StoredRequest

_KINDS: dict[str, type[Any]] = {
    "ready": messages.Ready,
    "unusable": messages.Unusable,
    "captured": messages.Captured,
    "drawn": messages.Drawn,
    "failed": messages.Failed,
    "create": messages.CreateRun,
    "created": messages.RunCreated,
    "restore": messages.RestoreRun,
    "restored": messages.RunRestored,
    "load": messages.LoadCheckpoint,
    "loaded": messages.CheckpointLoaded,
    "pass": messages.TrainingPass,
    "pass-done": messages.PassDone,
    "optim_step": messages.OptimStep,
    "optim_step-done": messages.OptimStepDone,
    "drop": messages.DropRun,
    "dropped": messages.RunDropped,
    "save": messages.SaveRun,
    "saved": messages.RunSaved,
    "sample": messages.Sample,
    "sample-done": messages.SampleDone,
    "watch": messages.Watch,
    "cancel": messages.Cancel,
    "encode": messages.Encode,
    "encoded": messages.Encoded,
    "import": messages.ImportAdapter,
    "imported": messages.AdapterImported,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_BODY = "body"
_SOURCE = "source"
_STORED = "stored"


def kind_of(message: messages.Message) -> str:
    """Return the kind of a message, as its header names it."""
    return _NAMES[type(message)]


def encode(message: messages.Message) -> tuple[dict[str, Any], bytes]:
    """Return a message's header, as JSON values, and its body."""
    values = {each.name: getattr(message, each.name) for each in fields(message)}  # type: ignore[arg-type]
    body = values.pop(_BODY, b"")
    if isinstance(message, messages.Ready):
        values["models"] = [info.to_dict() for info in message.models]
    elif isinstance(message, messages.Drawn):
        values["drawn"] = [each.model_dump(exclude_none=True) for each in message.drawn]
    return {"kind": kind_of(message), **values}, body


def decode(header: Mapping[str, Any], body: Data) -> messages.Message:
    """Return the message of a header and a body. The inverse of `encode`.

    JSON has no tuples: they come back as lists, except for named ones.

    Raises:
        KeyError, TypeError: the header is not of a message of this version.
    """
    values = dict(header)
    kind = _KINDS[values.pop("kind")]
    if _BODY in kind.__dataclass_fields__:
        values[_BODY] = body
    if kind is messages.Ready:
        values["models"] = [ModelInfo.from_dict(info) for info in values["models"]]
    elif kind is messages.Drawn:
        values["drawn"] = [DrawnTokens(**each) for each in values["drawn"]]
    elif values.get(_SOURCE) is not None:
        values[_SOURCE] = CheckpointId(*values[_SOURCE])
    if values.get(_STORED) is not None:
        values[_STORED] = StoredRequest(*values[_STORED])
    message: messages.Message = kind(**values)
    return message
