"""Runs: a session and its runs over raw requests, with explicit sequence ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from everstep.conformance.operations import Outcome, Payload, Pending
from everstep.conformance.transport import Exchange, Transport
from everstep.conformance.verdicts import CheckError
from everstep.wire import types
from everstep.wire.codecs.proto import PROTOBUF, encode_forward_backward_request

_HEARTBEAT_SECONDS = 10.0
_SDK_VERSION = "0.38.0"  # a service's responses may depend on the official SDK's version


class Session:
    """A session of one key.

    Args:
        transport: sends requests with that key.
        timeout: seconds to wait for a result.
        json_passes: send training passes as JSON, for services without protobuf.
    """

    def __init__(self, transport: Transport, timeout: float, *, json_passes: bool = False) -> None:
        self.transport = transport
        self.json_passes = json_passes
        self.runs: list[Run] = []
        self._timeout = timeout
        self._run_count = 0
        self._sampler_count = 0
        request = types.CreateSessionRequest(tags=["conformance"], sdk_version=_SDK_VERSION)
        answer = transport.send("POST", "/create_session", _body(request))
        self.session_id = str(answer.json().get("session_id", ""))
        if not answer.ok or not self.session_id:
            raise CheckError("No session could be created", answer.sent, answer.came_back)
        self._last_heartbeat = time.monotonic()

    def submit(self, path: str, request: BaseModel, payload: Payload = "json") -> Pending:
        """Submit an operation."""
        self._keep_alive()
        answer = self.transport.send("POST", path, _body(request))
        return Pending(self.transport, answer, payload, self._timeout)

    def submit_pass(self, request: types.ForwardBackwardRequest, *, forward_only: bool) -> Pending:
        """Submit a training pass."""
        self._keep_alive()
        body = request.forward_backward_input
        note = (
            f"{{model_id: {request.model_id}, seq_id: {request.seq_id}, {len(body.data)} datums, "
            f"{body.loss_fn}{', forward_only' if forward_only else ''}}}"
        )
        if self.json_passes:
            path = "/forward" if forward_only else "/forward_backward"
            content = _body(request)
            if forward_only:
                content["forward_input"] = content.pop("forward_backward_input")
            answer = self.transport.send("POST", path, content, note=note)
        else:
            answer = self.transport.send(
                "POST",
                "/forward_backward",
                content=encode_forward_backward_request(request, forward_only=forward_only),
                headers={"Content-Type": PROTOBUF},
                note=note,
            )
        return Pending(self.transport, answer, "pass", self._timeout)

    def create_run(self, model: str, *, rank: int = 8, seed: int | None = 7, **flags: bool) -> Run:
        """Create a run. Raises `CheckError` if that fails."""
        return self.run_of(self.create(model, rank=rank, seed=seed, **flags), "create_model")

    def create(self, model: str, *, rank: int = 8, seed: int | None = 7, **flags: bool) -> Outcome:
        """Request a run."""
        request = types.CreateModelRequest(
            session_id=self.session_id,
            model_seq_id=self.next_run(),
            base_model=model,
            lora_config=types.LoraConfig(rank=rank, seed=seed, **flags),
        )
        return self.submit("/create_model", request).outcome()

    def create_from_state(
        self, path: str, *, optimizer: bool, model_seq_id: int | None = None
    ) -> Outcome:
        """Request a run from a checkpoint."""
        request = types.LoadWeightsRequest(
            session_id=self.session_id,
            model_seq_id=self.next_run() if model_seq_id is None else model_seq_id,
            path=path,
            optimizer=optimizer,
        )
        return self.submit("/load_weights", request).outcome()

    def run_of(self, outcome: Outcome, operation: str) -> Run:
        """Return the run that an operation created."""
        model_id = str(outcome.require(operation).value.get("model_id") or "")
        if not model_id:
            raise CheckError(f"{operation} returned no model_id", outcome.sent, outcome.came_back)
        known = next((run for run in self.runs if run.model_id == model_id), None)
        if known is None:
            known = Run(self, model_id)
            self.runs.append(known)
        return known

    def next_run(self) -> int:
        """Return the number of the session's next run."""
        self._run_count += 1
        return self._run_count - 1

    def next_sampler(self) -> int:
        """Return the number of the session's next sampler."""
        self._sampler_count += 1
        return self._sampler_count - 1

    def post(self, path: str, request: BaseModel) -> Exchange:
        """Send a request that is answered at once."""
        self._keep_alive()
        return self.transport.send("POST", path, _body(request))

    def finish(self) -> None:
        """End the session."""
        request = types.FinishSessionRequest()
        self.transport.send("POST", f"/sessions/{self.session_id}/finish", _body(request))

    def _keep_alive(self) -> None:
        if time.monotonic() - self._last_heartbeat > _HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            request = types.SessionHeartbeatRequest(session_id=self.session_id)
            self.transport.send("POST", "/session_heartbeat", _body(request))


class Run:
    """A run, and the sequence id of its next operation."""

    def __init__(self, session: Session, model_id: str) -> None:
        self.session = session
        self.model_id = model_id
        self._next = 1

    def reserve(self, count: int = 1) -> list[int]:
        """Reserve sequence ids, for operations that are sent in another order."""
        first, self._next = self._next, self._next + count
        return list(range(first, self._next))

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        *,
        seq_id: int | None = None,
        loss_fn: str = "cross_entropy",
        forward_only: bool = False,
    ) -> Pending:
        """Submit a training pass."""
        request = types.ForwardBackwardRequest(
            forward_backward_input=types.ForwardBackwardInput(data=list(data), loss_fn=loss_fn),
            model_id=self.model_id,
            seq_id=self._seq_id(seq_id),
        )
        return self.session.submit_pass(request, forward_only=forward_only)

    def forward(self, data: Sequence[types.Datum], *, seq_id: int | None = None) -> Pending:
        """Submit a pass without gradients."""
        return self.forward_backward(data, seq_id=seq_id, forward_only=True)

    def optim_step(self, learning_rate: float, *, seq_id: int | None = None) -> Pending:
        """Submit an optimizer step."""
        request = types.OptimStepRequest(
            model_id=self.model_id,
            seq_id=self._seq_id(seq_id),
            adam_params=types.AdamParams(learning_rate=learning_rate),
        )
        return self.session.submit("/optim_step", request)

    def save(self, name: str | None, *, seq_id: int | None = None, **options: Any) -> Pending:
        """Submit a save of the training state.

        Args:
            name: of the checkpoint. None lets the service choose one.
            seq_id: its sequence id, by default the next one.
            options: ``overwrite``, ``ttl_seconds``, ``user_metadata``.
        """
        seq_id = self._seq_id(seq_id)
        request = types.SaveWeightsRequest(
            model_id=self.model_id, seq_id=seq_id, path=name, **options
        )
        return self.session.submit("/save_weights", request)

    def save_for_sampler(
        self, name: str | None, *, seq_id: int | None = None, **options: Any
    ) -> Pending:
        """Submit a save for sampling. Without a name it becomes a sampler of the session."""
        seq_id = self._seq_id(seq_id)
        if name is None:
            options["sampling_session_seq_id"] = self.session.next_sampler()
        request = types.SaveWeightsForSamplerRequest(
            model_id=self.model_id, seq_id=seq_id, path=name, **options
        )
        return self.session.submit("/save_weights_for_sampler", request)

    def save_external(self, name: str) -> Pending:
        """Submit a save as files to download."""
        request = types.SaveWeightsExternalRequest(
            model_id=self.model_id, seq_id=self._seq_id(None), path=name
        )
        return self.session.submit("/save_weights_external", request)

    def load(self, path: str, *, optimizer: bool) -> Pending:
        """Submit a load into this run."""
        request = types.LoadWeightsRequest(
            model_id=self.model_id, seq_id=self._seq_id(None), path=path, optimizer=optimizer
        )
        return self.session.submit("/load_weights", request)

    def path_of(self, segment: str, name: str) -> str:
        """Return the path of one of its checkpoints."""
        return f"tinker://{self.model_id}/{segment}/{name}"

    def _seq_id(self, seq_id: int | None) -> int:
        return self.reserve()[0] if seq_id is None else seq_id


def _body(request: BaseModel) -> dict[str, Any]:
    content: dict[str, Any] = request.model_dump(mode="json", exclude_none=True)
    return content


def saved_path(outcome: Outcome) -> str:
    """Return the path in a save's result."""
    return str(outcome.value.get("path") or "")
