"""A session and its runs, over raw requests: every operation is submitted with its sequence id."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from everstep.conformance.operations import Outcome, Payload, Pending
from everstep.conformance.transport import Exchange, Transport
from everstep.conformance.verdicts import Stuck
from everstep.wire import types
from everstep.wire.proto import PROTOBUF, encode_forward_backward_request

_HEARTBEAT_SECONDS = 10.0
_SDK_VERSION = "0.38.0"  # services may answer by the version of the official SDK


class Session:
    """A session of one key.

    Args:
        transport: requests with that key.
        timeout: seconds to wait for a result.
        json_passes: whether training passes travel as JSON, for services without protobuf.
    """

    def __init__(self, transport: Transport, timeout: float, *, json_passes: bool = False) -> None:
        self.transport = transport
        self.json_passes = json_passes
        self.runs: list[Run] = []
        self._timeout = timeout
        self._runs_begun = 0
        self._samplers_begun = 0
        request = types.CreateSessionRequest(tags=["conformance"], sdk_version=_SDK_VERSION)
        answer = transport.send("POST", "/create_session", _body(request))
        self.session_id = str(answer.json().get("session_id", ""))
        if not answer.ok or not self.session_id:
            raise Stuck("No session could be opened", answer.sent, answer.came_back)
        self._beat = time.monotonic()

    def submit(self, path: str, request: BaseModel, payload: Payload = "json") -> Pending:
        """Send an operation."""
        self._keep_alive()
        answer = self.transport.send("POST", path, _body(request))
        return Pending(self.transport, answer, payload, self._timeout)

    def submit_pass(self, request: types.ForwardBackwardRequest, *, forward_only: bool) -> Pending:
        """Send a training pass."""
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
        """Create a run; raises `Stuck` when that does not work."""
        return self.run_of(self.create(model, rank=rank, seed=seed, **flags), "create_model")

    def create(self, model: str, *, rank: int = 8, seed: int | None = 7, **flags: bool) -> Outcome:
        """Ask for a run."""
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
        """Ask for a run from a checkpoint."""
        request = types.LoadWeightsRequest(
            session_id=self.session_id,
            model_seq_id=self.next_run() if model_seq_id is None else model_seq_id,
            path=path,
            optimizer=optimizer,
        )
        return self.submit("/load_weights", request).outcome()

    def run_of(self, outcome: Outcome, what: str) -> Run:
        """The run that an operation created."""
        model_id = str(outcome.needed(what).value.get("model_id") or "")
        if not model_id:
            raise Stuck(f"{what} gave no model_id", outcome.sent, outcome.came_back)
        known = next((run for run in self.runs if run.model_id == model_id), None)
        if known is None:
            known = Run(self, model_id)
            self.runs.append(known)
        return known

    def next_run(self) -> int:
        """The place of the session's next run."""
        self._runs_begun += 1
        return self._runs_begun - 1

    def next_sampler(self) -> int:
        """The place of the session's next sampler."""
        self._samplers_begun += 1
        return self._samplers_begun - 1

    def post(self, path: str, request: BaseModel) -> Exchange:
        """Send what is answered at once."""
        self._keep_alive()
        return self.transport.send("POST", path, _body(request))

    def finish(self) -> None:
        """End the session."""
        request = types.FinishSessionRequest()
        self.transport.send("POST", f"/sessions/{self.session_id}/finish", _body(request))

    def _keep_alive(self) -> None:
        if time.monotonic() - self._beat > _HEARTBEAT_SECONDS:
            self._beat = time.monotonic()
            request = types.SessionHeartbeatRequest(session_id=self.session_id)
            self.transport.send("POST", "/session_heartbeat", _body(request))


class Run:
    """A run, and the sequence id of its next operation."""

    def __init__(self, session: Session, model_id: str) -> None:
        self.session = session
        self.model_id = model_id
        self._next = 1

    def take(self, count: int = 1) -> list[int]:
        """Reserve sequence ids: the operations are then sent in any order."""
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
            seq_id=self._place(seq_id),
        )
        return self.session.submit_pass(request, forward_only=forward_only)

    def forward(self, data: Sequence[types.Datum], *, seq_id: int | None = None) -> Pending:
        """Submit a pass without gradients."""
        return self.forward_backward(data, seq_id=seq_id, forward_only=True)

    def optim_step(self, learning_rate: float, *, seq_id: int | None = None) -> Pending:
        """Submit a step of the optimizer."""
        request = types.OptimStepRequest(
            model_id=self.model_id,
            seq_id=self._place(seq_id),
            adam_params=types.AdamParams(learning_rate=learning_rate),
        )
        return self.session.submit("/optim_step", request)

    def save(self, name: str | None, *, seq_id: int | None = None, **options: Any) -> Pending:
        """Submit a save of the training state.

        Args:
            name: the checkpoint's; None has the service choose one.
            seq_id: its place; the next one when not given.
            options: ``overwrite``, ``ttl_seconds``, ``user_metadata``.
        """
        place = self._place(seq_id)
        request = types.SaveWeightsRequest(
            model_id=self.model_id, seq_id=place, path=name, **options
        )
        return self.session.submit("/save_weights", request)

    def save_for_sampler(
        self, name: str | None, *, seq_id: int | None = None, **options: Any
    ) -> Pending:
        """Submit a save to sample from; under no name it becomes a sampler of the session."""
        place = self._place(seq_id)
        if name is None:
            options["sampling_session_seq_id"] = self.session.next_sampler()
        request = types.SaveWeightsForSamplerRequest(
            model_id=self.model_id, seq_id=place, path=name, **options
        )
        return self.session.submit("/save_weights_for_sampler", request)

    def save_external(self, name: str) -> Pending:
        """Submit a save as files to download."""
        request = types.SaveWeightsExternalRequest(
            model_id=self.model_id, seq_id=self._place(None), path=name
        )
        return self.session.submit("/save_weights_external", request)

    def load(self, path: str, *, optimizer: bool) -> Pending:
        """Submit a load into this run."""
        request = types.LoadWeightsRequest(
            model_id=self.model_id, seq_id=self._place(None), path=path, optimizer=optimizer
        )
        return self.session.submit("/load_weights", request)

    def path_of(self, segment: str, name: str) -> str:
        """The path of one of its checkpoints."""
        return f"tinker://{self.model_id}/{segment}/{name}"

    def _place(self, seq_id: int | None) -> int:
        return self.take()[0] if seq_id is None else seq_id


def _body(request: BaseModel) -> dict[str, Any]:
    content: dict[str, Any] = request.model_dump(mode="json", exclude_none=True)
    return content


def saved_path(outcome: Outcome) -> str:
    """The path that a save gave."""
    path: Mapping[str, Any] = outcome.value
    return str(path.get("path") or "")
