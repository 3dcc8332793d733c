"""Operations: from a submit's response to the outcome of its future."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from everstep.conformance.transport import Exchange, Transport, Unreachable, short
from everstep.conformance.verdicts import CheckError, NotSupported, PromiseBroken
from everstep.wire.codecs.proto import (
    PROTOBUF,
    decode_forward_backward_output,
    decode_sample_response,
)
from everstep.wire.errors import InvalidRequest
from everstep.wire.messages.outputs import ForwardBackwardOutput, SampledSequence, SampleResponse
from everstep.wire.messages.tensors import TensorData

Payload = Literal["json", "pass", "sample"]
_NOT_SUPPORTED = frozenset({404, 405, 501})
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Outcome:
    """The outcome of an operation.

    Attributes:
        sent: the submit, shortened.
        came_back: the response that resolved it, shortened.
        ok: whether it succeeded.
        value: the result of an operation with a JSON result.
        output: the result of a training pass or a sample.
        error: the failure's message.
        category: of a failed future. None if the submit itself was refused.
        status: of a submit that was refused, else 200.
    """

    sent: str
    came_back: str
    ok: bool
    value: Mapping[str, Any]
    output: ForwardBackwardOutput | SampleResponse | None = None
    error: str = ""
    category: str | None = None
    status: int = 200

    @property
    def blames_user(self) -> bool:
        """Whether it failed because of a wrong request: category user, or a 4xx."""
        return not self.ok and (self.category == "user" or 400 <= self.status < 500)

    @property
    def absent(self) -> bool:
        """Whether the service lacks the endpoint."""
        return self.status in (405, 501)

    def must_succeed(self, promise: str) -> Outcome:
        """Return it, or raise `PromiseBroken` if it failed."""
        if not self.ok:
            raise PromiseBroken(promise, self.sent, self.came_back)
        return self

    def require(self, operation: str) -> Outcome:
        """Return it. Raises `CheckError` if it failed, `NotSupported` if there is no endpoint."""
        if self.absent:
            raise NotSupported(f"{operation}: the service has no such endpoint")
        if not self.ok:
            raise CheckError(f"{operation} did not work", self.sent, self.came_back)
        return self

    def must_blame_user(self, promise: str) -> Outcome:
        """Return it, or raise `PromiseBroken` unless it failed and blames the request."""
        if self.ok:
            raise PromiseBroken(promise, self.sent, self.came_back)
        if not self.blames_user:
            raise PromiseBroken(
                f"{promise} It failed, but does not blame the request: the category has to be "
                "'user'.",
                self.sent,
                self.came_back,
            )
        if not self.error.strip():
            raise PromiseBroken(
                f"{promise} It failed without a message.", self.sent, self.came_back
            )
        return self


class Pending:
    """A submitted operation.

    Args:
        transport: polls for its result.
        submit: the submit and its response.
        payload: encoding of its result.
        timeout: seconds to wait for the result.
    """

    def __init__(
        self, transport: Transport, submit: Exchange, payload: Payload, timeout: float
    ) -> None:
        self.submit = submit
        self.request_id: str | None = submit.json().get("request_id") if submit.ok else None
        self._transport = transport
        self._payload = payload
        self._timeout = timeout
        self._outcome: Outcome | None = None

    def outcome(self) -> Outcome:
        """Wait for the outcome.

        Raises:
            CheckError: there was no result in time, or it can't be parsed.
        """
        if self._outcome is None:
            self._outcome = self._wait()
        return self._outcome

    def completes_within(self, seconds: float) -> bool:
        """Return whether it completes within a time."""
        if self._outcome is not None or self.request_id is None:
            return True
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0:
            try:
                answer = self._retrieve(False, remaining)
            except Unreachable:  # the request is held: there is no result yet
                return False
            if not _try_again(answer):
                self._outcome = self._read(answer)
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _wait(self) -> Outcome:
        if self.request_id is None:
            if self.submit.ok:
                raise CheckError(
                    "A submit returned no request_id",
                    self.submit.sent,
                    self.submit.came_back,
                )
            return _refused(self.submit)
        deadline = time.monotonic() + self._timeout
        has_size = False
        while time.monotonic() < deadline:
            answer = self._retrieve(not has_size)
            if answer.json().get("status") == "complete_metadata":
                has_size = True
            elif not _try_again(answer):
                return self._read(answer)
            else:
                time.sleep(_POLL_SECONDS)
        raise CheckError(f"There was no result within {self._timeout:.0f} s", self.submit.sent, "")

    def _retrieve(self, metadata: bool, timeout: float | None = None) -> Exchange:
        accept = "application/json"
        if self._payload != "json":
            accept = f"{PROTOBUF}, application/json"
        return self._transport.send(
            "POST",
            "/retrieve_future",
            {"request_id": self.request_id, "allow_metadata_only": metadata},
            headers={"Accept": accept},
            timeout=timeout,
        )

    def _read(self, answer: Exchange) -> Outcome:
        sent = self.submit.sent
        if not answer.ok:
            raise CheckError(
                "The result of an operation can't be retrieved", sent, answer.came_back
            )
        try:
            if answer.content_type.startswith(PROTOBUF):
                output = self._decoded(answer.body)
                return Outcome(sent, answer.came_back, True, {}, output)
            content = answer.json()
            if "error" in content:
                category = str(content.get("category", "unknown"))
                error = str(content["error"])
                received = short(f"future failed ({category}): {error}")
                return Outcome(sent, received, False, {}, None, error, category)
            if self._payload == "json":
                return Outcome(sent, answer.came_back, True, content)
            output = _pass_output(content) if self._payload == "pass" else _sample(content)
            return Outcome(sent, answer.came_back, True, {}, output)
        except (InvalidRequest, KeyError, TypeError, ValueError) as error:
            text = f"The result of an operation can't be read: {error!r}"
            raise CheckError(text, sent, answer.came_back) from error

    def _decoded(self, body: bytes) -> ForwardBackwardOutput | SampleResponse:
        if self._payload == "pass":
            return decode_forward_backward_output(body)
        return decode_sample_response(body)


def _try_again(answer: Exchange) -> bool:
    return answer.status == 408 or answer.json().get("type") == "try_again"


def _refused(submit: Exchange) -> Outcome:
    content = submit.json()
    error = str(content.get("detail") or content.get("error") or submit.came_back)
    category = content.get("category")
    return Outcome(
        submit.sent, submit.came_back, False, {}, None, error, category, status=submit.status
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)  # also parses "NaN" and "Infinity"


def _pass_output(content: Mapping[str, Any]) -> ForwardBackwardOutput:
    outputs = []
    for row in content["loss_fn_outputs"]:
        tensors = {}
        for name, tensor in row.items():
            values = np.asarray([_number(value) for value in tensor["data"]], dtype=np.float32)
            tensors[name] = TensorData(values, "float32", tensor.get("shape"))
        outputs.append(tensors)
    metrics = {name: _number(value) for name, value in (content.get("metrics") or {}).items()}
    return ForwardBackwardOutput(str(content.get("loss_fn_output_type", "")), outputs, metrics)


def _sample(content: Mapping[str, Any]) -> SampleResponse:
    sequences = [
        SampledSequence(
            stop_reason="stop" if sequence["stop_reason"] == "stop" else "length",
            tokens_np=np.asarray(sequence["tokens"], dtype=np.int32),
            logprobs_np=_floats(sequence.get("logprobs")),
        )
        for sequence in content["sequences"]
    ]
    return SampleResponse(sequences, prompt_logprobs_np=_floats(content.get("prompt_logprobs")))


def _floats(values: list[Any] | None) -> np.ndarray[Any, Any] | None:
    if values is None:
        return None
    return np.asarray([_number(value) for value in values], dtype=np.float32)


def route_absent(answer: Exchange) -> bool:
    """Return whether a response about an existing object means that the endpoint is missing."""
    return answer.status in _NOT_SUPPORTED
