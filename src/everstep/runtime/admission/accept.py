"""Admission: validates a request and builds the operation that the ledger appends.

A request without a known session, run or sampler raises `Rejected`. An invalid request of a known
run becomes an operation recorded as failed. It still consumes its sequence id, so that the client's
next operation does not wait for it, and its future has the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from everstep.engine.config import AdapterConfig
from everstep.engine.errors import InputError
from everstep.engine.models.info import ModelInfo
from everstep.engine.prepared_pass import ModelLimits, PreparedPass
from everstep.engine.validation import check_adapter
from everstep.ledger import Failure, NewOperation, Operation, Run, Session, SessionFinished
from everstep.runtime import ids
from everstep.runtime.absence import absent
from everstep.runtime.admission.passes import PassAdmission
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.payloads import (
    check_optimizer,
    external_payload,
    new_run,
    optim_step_payload,
    optimizer_of,
    payload_json,
    save_payload,
)
from everstep.runtime.queries.known_runs import known_run
from everstep.runtime.workers.base import not_served
from everstep.wire import types
from everstep.wire.codecs.proto import TrainingPass
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.paths import parse_path, validate_name
from everstep.worker.protocol.prepared_sample import PreparedSample, prepare_sample

Save = types.SaveWeightsRequest | types.SaveWeightsExternalRequest
Request = (
    types.CreateModelRequest
    | types.LoadWeightsRequest
    | TrainingPass
    | PreparedPass
    | types.OptimStepRequest
    | types.SaveWeightsRequest
    | types.SaveWeightsForSamplerRequest
    | types.SaveWeightsExternalRequest
    | types.SampleRequest
    | PreparedSample
)
_SECRET_FIELD = "age_encryption_recipients"
"""A field of invalid requests that is not stored: it may hold a secret key."""
_USER_ERRORS = (InputError, OperationFailed, WireError)


@dataclass(frozen=True)
class Entry:
    """The rows that the ledger appends for a request.

    Attributes:
        operation: the operation. It may be recorded as failed.
        run: the run that it creates, if any.
        match_payload: False if the body of a retry may differ.
        rejected: raised to the client after the operation was appended.
        executes: False if its run is corrupted: it is recorded as failed and not dispatched.
    """

    operation: NewOperation
    run: Run | None = None
    match_payload: bool = True
    rejected: Rejected | None = None
    executes: bool = True


class Admission:
    """Validates requests and builds their operations.

    Args:
        context: of the service.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._ledger = context.ledger
        self._checkpoints = context.catalog
        self._workers = context.workers
        self._settings = context.settings
        self._access = context.authorization
        self._passes = PassAdmission(context)

    async def entry(self, request: Request) -> Entry:
        """Build the entry of a request.

        Raises:
            Rejected: its session, run or sampler is unknown, the session of a new run is finished,
                or it has no sequence id.
        """
        entry = await self._entry(request)
        operation = entry.operation
        if operation.kind not in ids.LOGGED and not operation.inline:
            entry = replace(entry, operation=replace(operation, inline=True))
        if entry.operation.kind == ids.SAMPLE:
            return entry
        run = await self._trainable(entry.operation.scope)
        if entry.run is not None or run is None or run.fault is None:
            return entry
        failure = Failure(run.fault, ErrorCategory.SERVER)
        return replace(entry, operation=replace(entry.operation, failure=failure), executes=False)

    async def _entry(self, request: Request) -> Entry:
        match request:
            case types.CreateModelRequest():
                return await self._create_model(request)
            case types.LoadWeightsRequest() if request.model_id is None:
                return await self._create_from_state(request)
            case types.SampleRequest() | PreparedSample():
                return await self._sample(request)
            case TrainingPass() | PreparedPass():
                return await self._training_pass(request)
            case types.OptimStepRequest():
                return await self._plain(
                    request, ids.OPTIM_STEP, partial(optim_step_payload, request)
                )
            case types.SaveWeightsRequest():
                payload = partial(self._saved, save_payload, request)
                return await self._plain(request, ids.SAVE_WEIGHTS, payload)
            case types.SaveWeightsForSamplerRequest():
                return await self._save_for_sampler(request)
            case types.SaveWeightsExternalRequest():
                payload = partial(self._saved, external_payload, request)
                return await self._plain(request, ids.SAVE_WEIGHTS_EXTERNAL, payload)
            case types.LoadWeightsRequest():
                return await self._load(request)
        raise TypeError(f"not a request: {type(request).__name__}")

    async def refused(self, kind: str, model_id: str, seq_id: int, message: str) -> Entry:
        """Build the entry of a request with an unreadable body and a known run and sequence id.

        Raises:
            Rejected: the run is unknown.
        """
        run = await self.run(model_id)
        failure = Failure(message, ErrorCategory.USER)
        operation = NewOperation(run.run_id, seq_id, kind, b"", failure, run.session_id)
        await self._trainable(run.run_id)
        return Entry(operation)

    async def _trainable(self, run_id: str) -> Run | None:
        """Return a run, or None if there is none.

        Raises:
            Rejected: it only holds copies or imports (400).
        """
        run = await self._ledger.run(run_id)
        if run is not None and run.status == "copy":
            session = await self._ledger.session(run.session_id)
            if session is not None and session.finished is not None:
                raise _finished(session)
            raise Rejected(
                400,
                f"Model {run_id} holds a copy of a checkpoint, or an imported one, and takes no "
                "operations. Create a training client from that checkpoint.",
            )
        return run

    async def run(self, model_id: str | None) -> Run:
        """Return a run. Raises `Rejected` (404) for an unknown one."""
        return await known_run(self._ledger, model_id)

    async def session_id(self, session_id: str | None) -> str:
        """Return the id of an open session. Raises `Rejected` (404, 400) for another."""
        session = await self._ledger.session(session_id) if session_id else None
        if session is None:
            text = f"Session {session_id} does not exist. Create it first."
            raise await absent(self._ledger, session_id, text)
        if session.finished is not None:
            raise _finished(session)
        return session.session_id

    # Creation

    async def _create_model(self, request: types.CreateModelRequest) -> Entry:
        session_id = await self.session_id(request.session_id)
        run_id = ids.run_id(session_id, _required(request.model_seq_id, "model_seq_id"))
        await self._ledger.deletions.require_absent(run_id)
        config = request.lora_config or types.LoraConfig()
        flags = {f: getattr(config, f) for f in ("train_attn", "train_mlp", "train_unembed")}
        seed = config.seed if config.seed is not None else ids.seed_for(run_id, 0)
        failure = None
        lora: dict[str, Any] = {"rank": config.rank, "alpha": 32.0, "seed": seed, **flags}
        optimizer = optimizer_of(request.optimizer_config)
        try:
            self.model(request.base_model)
            check_adapter(AdapterConfig(**lora))
            check_optimizer(optimizer)
        except _USER_ERRORS as error:
            failure = _failure(error)
        run = new_run(run_id, session_id, request.base_model, lora, optimizer, request)
        payload = payload_json({"base_model": request.base_model, "adapter": lora})
        operation = NewOperation(run_id, 0, ids.CREATE_MODEL, payload, failure, session_id)
        return Entry(operation, None if failure else run)

    async def _create_from_state(self, request: types.LoadWeightsRequest) -> Entry:
        session_id = await self.session_id(request.session_id)
        run_id = ids.run_id(session_id, _required(request.model_seq_id, "model_seq_id"))
        await self._ledger.deletions.require_absent(run_id)
        payload = {"path": request.path, "optimizer": request.optimizer}
        operation = NewOperation(
            run_id, 0, ids.CREATE_FROM_STATE, payload_json(payload), None, session_id
        )
        try:
            await self._access.check(request.path, request.weights_access_token)
            checkpoint = await self._checkpoints.loadable(request.path, optimizer=request.optimizer)
            self.model(checkpoint.base_model)
            if request.base_model not in (None, checkpoint.base_model):
                raise OperationFailed(
                    f"Checkpoint {request.path} was trained on {checkpoint.base_model}, not on "
                    f"{request.base_model}. Leave base_model out, or name the checkpoint's."
                )
            optimizer = optimizer_of(request.optimizer_config)
            check_optimizer(optimizer)
        except _USER_ERRORS as error:
            return Entry(replace(operation, failure=_failure(error)))
        run = new_run(
            run_id, session_id, checkpoint.base_model, checkpoint.lora, optimizer, request
        )
        return Entry(operation, run)

    def model(self, name: str | None) -> ModelInfo:
        """Return a served model. Raises `OperationFailed` for another."""
        models = self._workers.models
        if not name:
            raise OperationFailed("base_model is required")
        if name not in models:
            raise OperationFailed(not_served(self._workers, name))
        return models[name]

    def base(self, run: Run) -> ModelInfo:
        """Return the base model of a run. Raises `Rejected` (503) if it isn't served."""
        info = self._workers.models.get(run.base_model)
        if info is None:
            raise Rejected(
                503,
                f"Run {run.run_id} can't go on: {not_served(self._workers, run.base_model)}",
            )
        return info

    # Training operations

    async def _training_pass(self, request: TrainingPass | PreparedPass) -> Entry:
        run = await self.run(request.model_id)
        info = self.base(run)
        kind = ids.FORWARD if request.forward_only else ids.FORWARD_BACKWARD
        admitted = await self._passes.admit(run, info, request)
        operation = NewOperation(
            run.run_id,
            _required(request.seq_id, "seq_id"),
            kind,
            admitted.payload,
            admitted.failure,
            run.session_id,
            uses=admitted.uses,
        )
        return Entry(operation, match_payload=admitted.match_payload)

    async def _plain(
        self,
        request: types.OptimStepRequest | Save,
        kind: str,
        payload: Callable[[], dict[str, Any]],
    ) -> Entry:
        run = await self.run(request.model_id)
        seq_id = _required(request.seq_id, "seq_id")
        operation = partial(
            NewOperation, run.run_id, seq_id, kind, session_id=run.session_id, inline=True
        )
        try:
            return Entry(operation(payload_json(payload())))
        except _USER_ERRORS as error:
            body = request.model_dump(mode="json", exclude_none=True, exclude={_SECRET_FIELD})
            return Entry(operation(payload_json(body), failure=_failure(error)))

    def _saved(self, payload: Callable[[Any], dict[str, Any]], request: Save) -> dict[str, Any]:
        self._checkpoints.check_ttl(request.ttl_seconds)
        return payload(request)

    async def _save_for_sampler(self, request: types.SaveWeightsForSamplerRequest) -> Entry:
        run = await self.run(request.model_id)
        seq_id = _required(request.seq_id, "seq_id")
        payload: dict[str, Any] = {
            "name": request.path,
            "ttl_seconds": request.ttl_seconds,
            "user_metadata": request.user_metadata,
        }
        failure = None
        if request.path is None:
            _required(request.sampling_session_seq_id, "sampling_session_seq_id")
            payload["name"] = f"ephemeral-{seq_id}"
            payload["sampler_id"] = ids.saved_sampler_id(run.run_id, seq_id)
        inflight = request.kind == "inflight"
        if inflight:
            payload["inflight"] = True
        try:
            if inflight and request.path is not None:
                raise OperationFailed(
                    f"kind 'inflight' takes no name; got {request.path!r}. Leave the name out, or "
                    "save a snapshot."
                )
            validate_name(payload["name"])
            self._checkpoints.check_ttl(request.ttl_seconds)
        except _USER_ERRORS as error:
            failure = _failure(error)
        kind = ids.SAVE_WEIGHTS_FOR_SAMPLER
        operation = NewOperation(
            run.run_id, seq_id, kind, payload_json(payload), failure, run.session_id
        )
        return Entry(operation, match_payload=request.path is not None)

    async def _load(self, request: types.LoadWeightsRequest) -> Entry:
        run = await self.run(request.model_id)
        seq_id = _required(request.seq_id, "seq_id")
        payload = payload_json({"path": request.path, "optimizer": request.optimizer})
        operation = NewOperation(
            run.run_id, seq_id, ids.LOAD_WEIGHTS, payload, None, run.session_id
        )
        if self._settings.load_first_only and seq_id != 1:
            text = f"LoadWeights is not permitted with seq_id {seq_id}"
            failed = replace(operation, failure=Failure(text, ErrorCategory.USER))
            return Entry(failed, rejected=Rejected(400, text))
        try:
            parse_path(request.path)
            await self._access.check(request.path, request.weights_access_token)
        except _USER_ERRORS as error:
            operation = replace(operation, failure=_failure(error))
        return Entry(operation)

    def unload(self, run: Run, earlier: Sequence[Operation]) -> NewOperation:
        """Build the operation that unloads a run. Clients don't number these."""
        scope = ids.unload_scope(run.run_id)
        return NewOperation(scope, len(earlier), ids.UNLOAD_MODEL, b"", None, run.session_id)

    # Sampling

    async def _sample(self, request: types.SampleRequest | PreparedSample) -> Entry:
        if request.sampling_session_id is None:
            raise Rejected(400, "sampling_session_id is required: create a sampling session first.")
        sampler = await self._ledger.sampler(request.sampling_session_id)
        if sampler is None:
            text = f"Sampling session {request.sampling_session_id} does not exist."
            raise await absent(self._ledger, request.sampling_session_id, text)
        seq_id = _required(request.seq_id, "seq_id")
        limits, failure = None, None
        try:
            info = self.model(sampler.base_model)
            limits = ModelLimits(info.vocab_size, info.max_context_length)
        except OperationFailed as error:
            failure = _failure(error)
        if isinstance(request, types.SampleRequest):
            request = prepare_sample(request, () if limits is None else (limits,))
        if limits is not None and (reason := request.failures[limits]) is not None:
            failure = Failure(reason, ErrorCategory.USER)
        return Entry(
            NewOperation(
                sampler.sampler_id,
                seq_id,
                ids.SAMPLE,
                request.payload,
                failure,
                sampler.session_id,
                is_sample=True,
            )
        )


def _required(value: int | None, field: str) -> int:
    if value is None or value < 0:
        raise Rejected(400, f"{field} is required and must be 0 or greater; got {value}.")
    return value


def _finished(session: Session) -> Rejected:
    return Rejected(400, str(SessionFinished(session.session_id, session.finished)))


def _failure(error: Exception) -> Failure:
    return Failure(str(error), ErrorCategory.USER)
