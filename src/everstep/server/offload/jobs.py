"""Jobs: what the process computes. Functions of arguments in JSON and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from everstep.engine.prepared_pass import ModelLimits, prepare
from everstep.server.json_results import json_result_bytes
from everstep.server.passes import MAX_BODY_BYTES, InvalidOperation, PassForm
from everstep.spool import as_bytes
from everstep.wire.base import parse
from everstep.wire.codecs.body import decompress
from everstep.wire.errors import BodyTooLarge, InvalidRequest, WireError
from everstep.wire.messages.requests import SampleRequest
from everstep.worker.protocol import prepared_sample

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
    facts = {
        "model_id": prepared.model_id,
        "seq_id": prepared.seq_id,
        "loss_fn": prepared.loss_fn,
        "forward_only": prepared.forward_only,
        "failures": _listed(prepared.failures),
    }
    return facts, as_bytes(prepared.payload)


def prepare_sample(arguments: Arguments, body: bytes) -> Outcome:
    """Decode, check and encode a sample request. See `PreparedSample`.

    Args:
        arguments: the body's ``encoding``, ``newer_client`` as for `parse`, limits of the
            ``models``.
        body: the request as it was received.
    """
    try:
        plain = decompress(body, arguments["encoding"], MAX_BODY_BYTES)
        request = parse(SampleRequest, plain, newer_client=arguments["newer_client"])
    except WireError as error:
        return {"error": _described(error)}, b""
    models = [ModelLimits(*limits) for limits in arguments["models"]]
    prepared = prepared_sample.prepare_sample(request, models)
    facts = {
        "sampling_session_id": prepared.sampling_session_id,
        "seq_id": prepared.seq_id,
        "failures": _listed(prepared.failures),
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
    "prepare_sample": prepare_sample,
    "convert_result": convert_result,
}


def _listed(failures: Mapping[ModelLimits, str | None]) -> list[list[Any]]:
    return [[each.vocab_size, each.max_context_length, text] for each, text in failures.items()]


def failures_of(facts: Mapping[str, Any]) -> dict[ModelLimits, str | None]:
    """Return the failures that a job found, by the limits of the model."""
    return {ModelLimits(*limits): text for *limits, text in facts["failures"]}


def _described(error: WireError) -> dict[str, Any]:
    operation = error.operation if isinstance(error, InvalidOperation) else None
    too_large = isinstance(error, BodyTooLarge)
    return {"text": str(error), "operation": operation, "too_large": too_large}


def raise_described(error: Mapping[str, Any]) -> None:
    """Raise the error that a job described."""
    if error["operation"] is not None:
        raise InvalidOperation(error["text"], *error["operation"])
    raise (BodyTooLarge if error["too_large"] else InvalidRequest)(error["text"])
