"""Bodies of training passes: bounded, decompressed and decoded. No FastAPI."""

from __future__ import annotations

import json
from dataclasses import dataclass

from everstep.integers import MAX_INT64
from everstep.json_values import check_json
from everstep.wire.base import parse
from everstep.wire.codecs.body import decompress, head, too_large
from everstep.wire.codecs.proto import TrainingPass, decode_request, run_and_seq_id_of
from everstep.wire.errors import BodyTooLarge, InvalidRequest
from everstep.wire.messages.requests import ForwardBackwardRequest, ForwardRequest

MAX_BODY_BYTES = 64 << 20
_HEAD_BYTES = 1024


class InvalidOperation(InvalidRequest):
    """An invalid request for an operation whose run and sequence id are known."""

    def __init__(self, message: str, model_id: str, seq_id: int) -> None:
        super().__init__(message, model_id=model_id, seq_id=seq_id)
        self.operation = model_id, seq_id


@dataclass(frozen=True)
class PassForm:
    """How the body of a training pass is encoded.

    Attributes:
        protobuf: whether it is protobuf, or JSON.
        forward: whether its JSON is a `ForwardRequest`, or a `ForwardBackwardRequest`.
        newer_client: as for `parse`.
        encoding: its Content-Encoding.
    """

    protobuf: bool
    forward: bool
    newer_client: bool
    encoding: str | None

    def read(self, body: bytes) -> TrainingPass:
        """Decompress and decode a body.

        Raises:
            InvalidOperation: it is invalid, and names its run and sequence id.
            BodyTooLarge: it is too large, and its run is unknown.
            InvalidRequest: it is otherwise invalid.
        """
        try:
            plain = decompress(body, self.encoding, MAX_BODY_BYTES)
        except BodyTooLarge as error:
            raise self.too_large(body) from error
        return self.decode(plain)

    def decode(self, plain: bytes) -> TrainingPass:
        """Decode a decompressed body. Raises as `read` does."""
        try:
            if self.protobuf:
                return decode_request(plain, newer_client=self.newer_client)
            model: type[ForwardRequest | ForwardBackwardRequest]
            model = ForwardRequest if self.forward else ForwardBackwardRequest
            return TrainingPass.from_request(parse(model, plain, newer_client=self.newer_client))
        except InvalidRequest as error:
            raise invalid_operation(plain, error) from error

    def too_large(self, start: bytes) -> InvalidRequest | BodyTooLarge:
        """Return the error for a body over the limit.

        Args:
            start: its first bytes as received. They may identify the run.
        """
        error = too_large(MAX_BODY_BYTES)
        known = None
        if self.protobuf:
            known = run_and_seq_id_of(head(start, self.encoding, _HEAD_BYTES))
        return error if known is None else InvalidOperation(str(error), *known)


def invalid_operation(body: bytes, error: InvalidRequest) -> InvalidRequest:
    """Return the error with the run and sequence id that it, or a JSON body, names."""
    model_id, seq_id = error.model_id, error.seq_id
    if model_id is None or seq_id is None:
        try:
            content = json.loads(body)
            model_id, seq_id = content["model_id"], content["seq_id"]
            check_json(model_id, "model_id")
        except (ValueError, KeyError, TypeError, RecursionError):
            return error
    if not isinstance(model_id, str) or not isinstance(seq_id, int):
        return error
    return InvalidOperation(str(error), model_id, seq_id) if 1 <= seq_id <= MAX_INT64 else error
