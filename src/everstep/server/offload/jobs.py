"""Jobs: what the process computes. Functions of arguments in JSON and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from everstep.engine.prepared_pass import ModelLimits, prepare
from everstep.server.json_results import json_result_bytes
from everstep.server.passes import InvalidOperation, PassForm
from everstep.wire.errors import BodyTooLarge, InvalidRequest, WireError

Arguments = Mapping[str, Any]
Outcome = tuple[dict[str, Any], bytes]


def prepare_pass(arguments: Arguments, body: bytes) -> Outcome:
    """Decode, check and encode a training pass. See `PreparedPass`.

    Args:
        arguments: ``form`` of the body, limits of the ``models``, ``refuse_stable_reinforce``.
        body: the pass as it was received.
    """
    form = PassForm(**arguments["form"])
    models = [ModelLimits(*limits) for limits in arguments["models"]]
    try:
        request = form.read(body)
    except WireError as error:
        return {"error": _described(error)}, b""
    refuse = arguments["refuse_stable_reinforce"]
    prepared = prepare(request, models, refuse_stable_reinforce=refuse)
    failures = [
        [limits.vocab_size, limits.max_context_length, text]
        for limits, text in prepared.failures.items()
    ]
    facts = {
        "model_id": prepared.model_id,
        "seq_id": prepared.seq_id,
        "loss_fn": prepared.loss_fn,
        "forward_only": prepared.forward_only,
        "failures": failures,
    }
    return facts, prepared.payload


def convert_result(arguments: Arguments, body: bytes) -> Outcome:
    """Convert a result from protobuf to JSON.

    Args:
        arguments: the ``kind`` of the operation.
        body: the result.
    """
    return {}, json_result_bytes(arguments["kind"], body)


JOBS: Mapping[str, Callable[[Arguments, bytes], Outcome]] = {
    "prepare_pass": prepare_pass,
    "convert_result": convert_result,
}


def _described(error: WireError) -> dict[str, Any]:
    operation = error.operation if isinstance(error, InvalidOperation) else None
    too_large = isinstance(error, BodyTooLarge)
    return {"text": str(error), "operation": operation, "too_large": too_large}


def raise_described(error: Mapping[str, Any]) -> None:
    """Raise the error that a job described."""
    if error["operation"] is not None:
        raise InvalidOperation(error["text"], *error["operation"])
    raise (BodyTooLarge if error["too_large"] else InvalidRequest)(error["text"])
