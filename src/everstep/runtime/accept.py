"""From a request to what the ledger appends: attribution, validation, canonical payload.

A request that can't be attributed to a run raises `Rejected`. One that can, but is wrong, becomes
an operation that is born failed: it takes its sequence id, so that the client's next operation
doesn't wait for it, and its future says what was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from everstep.engine.config import AdapterConfig
from everstep.engine.errors import InputError
from everstep.engine.info import ModelInfo
from everstep.engine.sample_validation import check_sample
from everstep.engine.validation import CUSTOM, check_adapter, check_pass
from everstep.ledger import Failure, Ledger, NewOperation, Operation, Run, Session
from everstep.runtime import names
from everstep.runtime.access import Access
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.custom_losses import with_program
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
from everstep.runtime.sample_specs import sample_spec
from everstep.runtime.settings import Settings
from everstep.wire import types
from everstep.wire.errors import ErrorCategory, WireError
from everstep.wire.paths import parse_path, validate_name
from everstep.wire.proto import TrainingPass, encode_training_pass

Save = types.SaveWeightsRequest | types.SaveWeightsExternalRequest
Request = (
    types.CreateModelRequest
    | types.LoadWeightsRequest
    | TrainingPass
    | types.OptimStepRequest
    | types.SaveWeightsRequest
    | types.SaveWeightsForSamplerRequest
    | types.SaveWeightsExternalRequest
    | types.SampleRequest
)
_MAY_BE_SECRET = "age_encryption_recipients"
"""What is not kept of a wrong request: someone may have given a secret key."""
_USER_ERRORS = (InputError, OperationFailed, WireError)


@dataclass(frozen=True)
class Entry:
    """What the ledger appends for a request.

    Attributes:
        operation: the operation, perhaps born failed.
        run: the run that it creates, if any.
        match_payload: False where a retry may differ in its body.
        rejected: raised to the client after the operation was appended.
        executes: False where its run can't go on: then it is born failed, and is only recorded.
    """

    operation: NewOperation
    run: Run | None = None
    match_payload: bool = True
    rejected: Rejected | None = None
    executes: bool = True


class Acceptance:
    """Validates requests.

    Args:
        ledger: where runs, sessions and samplers are looked up.
        checkpoints: where paths are looked up.
        models: returns what the worker serves.
        settings: limits.
        access: says who may read which checkpoint.
    """

    def __init__(
        self,
        ledger: Ledger,
        checkpoints: Checkpoints,
        models: Callable[[], Mapping[str, ModelInfo]],
        settings: Settings,
        access: Access,
    ) -> None:
        self._access = access
        self._ledger = ledger
        self._checkpoints = checkpoints
        self._models = models
        self._settings = settings

    async def entry(self, request: Request) -> Entry:
        """Return what to append for a request.

        Raises:
            Rejected: it names no known session, run or sampler, or one whose session is
                finished, or has no sequence id.
        """
        entry = await self._entry(request)
        await self._check_open(entry.operation)
        await self._check_trainable(entry.operation.scope)
        if entry.run is not None or entry.operation.kind == names.SAMPLE:
            return entry
        run = await self._ledger.run(entry.operation.scope)
        if run is None or run.fault is None:
            return entry
        failure = Failure(run.fault, ErrorCategory.SERVER)
        return replace(entry, operation=replace(entry.operation, failure=failure), executes=False)

    async def _entry(self, request: Request) -> Entry:
        match request:
            case types.CreateModelRequest():
                return await self._create_model(request)
            case types.LoadWeightsRequest() if request.model_id is None:
                return await self._create_from_state(request)
            case types.SampleRequest():
                return await self._sample(request)
            case TrainingPass():
                return await self._training_pass(request)
            case types.OptimStepRequest():
                return await self._plain(
                    request, names.OPTIM_STEP, partial(optim_step_payload, request)
                )
            case types.SaveWeightsRequest():
                payload = partial(self._saved, save_payload, request)
                return await self._plain(request, names.SAVE_WEIGHTS, payload)
            case types.SaveWeightsForSamplerRequest():
                return await self._save_for_sampler(request)
            case types.SaveWeightsExternalRequest():
                payload = partial(self._saved, external_payload, request)
                return await self._plain(request, names.SAVE_WEIGHTS_EXTERNAL, payload)
            case types.LoadWeightsRequest():
                return await self._load(request)
        raise TypeError(f"not a request: {type(request).__name__}")

    async def refused(self, kind: str, model_id: str, seq_id: int, message: str) -> Entry:
        """The entry of a request whose body could not be read, but whose run and place are known.

        Raises:
            Rejected: there is no such run, or its session is finished.
        """
        run = await self.run(model_id)
        failure = Failure(message, ErrorCategory.USER)
        operation = NewOperation(run.run_id, seq_id, kind, b"", failure, run.session_id)
        await self._check_open(operation)
        await self._check_trainable(run.run_id)
        return Entry(operation)

    async def _check_open(self, operation: NewOperation) -> None:
        """Raise `Rejected` (400) for a new operation of a finished session; a retry may come."""
        session = await self._ledger.session(operation.session_id or "")
        if session is None or session.finished is None:
            return
        if await self._ledger.operation_at(operation.scope, operation.seq_id) is None:
            raise _finished(session)

    async def _check_trainable(self, scope: str) -> None:
        """Raise `Rejected` (400) for a run that holds copies or imports."""
        run = await self._ledger.run(scope)
        if run is not None and run.status == "copy":
            raise Rejected(
                400,
                f"Model {scope} holds a copy of a checkpoint, or an imported one, and takes no "
                "operations. Create a training client from that checkpoint.",
            )

    async def run(self, model_id: str | None) -> Run:
        """Return a run that exists; raises `Rejected` (404) otherwise."""
        run = await self._ledger.run(model_id) if model_id else None
        if run is None:
            raise Rejected(
                404,
                f"Model {model_id} does not exist. Create it first (create_model), or check "
                "that its creation did not fail.",
            )
        return run

    async def session_id(self, session_id: str | None) -> str:
        """Return the id of a session that is open; raises `Rejected` (404, 400) otherwise."""
        session = await self._ledger.session(session_id) if session_id else None
        if session is None:
            raise Rejected(404, f"Session {session_id} does not exist. Create it first.")
        if session.finished is not None:
            raise _finished(session)
        return session.session_id

    # Creation

    async def _create_model(self, request: types.CreateModelRequest) -> Entry:
        session_id = await self.session_id(request.session_id)
        run_id = names.run_id(session_id, _required(request.model_seq_id, "model_seq_id"))
        config = request.lora_config or types.LoraConfig()
        flags = {f: getattr(config, f) for f in ("train_attn", "train_mlp", "train_unembed")}
        seed = config.seed if config.seed is not None else names.seed_for(run_id, 0)
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
        operation = NewOperation(run_id, 0, names.CREATE_MODEL, payload, failure, session_id)
        return Entry(operation, None if failure else run)

    async def _create_from_state(self, request: types.LoadWeightsRequest) -> Entry:
        session_id = await self.session_id(request.session_id)
        run_id = names.run_id(session_id, _required(request.model_seq_id, "model_seq_id"))
        payload = {"path": request.path, "optimizer": request.optimizer}
        operation = NewOperation(
            run_id, 0, names.CREATE_FROM_STATE, payload_json(payload), None, session_id
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
        """Return a model that is served; raises `OperationFailed` otherwise."""
        models = self._models()
        if not name:
            raise OperationFailed("base_model is required")
        if name not in models:
            raise OperationFailed(
                f"Model {name!r} is not served here. Served: {', '.join(sorted(models))}."
            )
        return models[name]

    def base(self, run: Run) -> ModelInfo:
        """Return the base model of a run; raises `Rejected` (503) when it isn't served now."""
        info = self._models().get(run.base_model)
        if info is None:
            raise Rejected(
                503,
                f"Model {run.base_model} of run {run.run_id} is not served now. Start the service "
                f"with --model {run.base_model}.",
            )
        return info

    # Training operations

    async def _training_pass(self, request: TrainingPass) -> Entry:
        run = await self.run(request.model_id)
        info = self.base(run)
        kind = names.FORWARD if request.forward_only else names.FORWARD_BACKWARD
        failure, program = None, None
        try:
            if request.loss_fn == CUSTOM:
                request, program = await with_program(self._ledger, run.session_id, request)
            check_pass(
                request.examples,
                request.loss_fn,
                request.loss_fn_config,
                vocab_size=info.vocab_size,
                max_context_length=info.max_context_length,
                program=program,
            )
        except _USER_ERRORS as error:
            failure = _failure(error)
        payload = encode_training_pass(request)
        seq_id = _required(request.seq_id, "seq_id")
        return Entry(NewOperation(run.run_id, seq_id, kind, payload, failure, run.session_id))

    async def _plain(
        self,
        request: types.OptimStepRequest | Save,
        kind: str,
        payload: Callable[[], dict[str, Any]],
    ) -> Entry:
        run = await self.run(request.model_id)
        seq_id = _required(request.seq_id, "seq_id")
        told = request.model_dump(mode="json", exclude_none=True, exclude={_MAY_BE_SECRET})
        raw = payload_json(told)
        operation = NewOperation(run.run_id, seq_id, kind, raw, None, run.session_id)
        try:
            return Entry(replace(operation, payload=payload_json(payload())))
        except _USER_ERRORS as error:
            return Entry(replace(operation, failure=_failure(error)))

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
            payload["sampler_id"] = names.saved_sampler_id(run.run_id, seq_id)
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
        kind = names.SAVE_WEIGHTS_FOR_SAMPLER
        operation = NewOperation(
            run.run_id, seq_id, kind, payload_json(payload), failure, run.session_id
        )
        return Entry(operation, match_payload=request.path is not None)

    async def _load(self, request: types.LoadWeightsRequest) -> Entry:
        run = await self.run(request.model_id)
        seq_id = _required(request.seq_id, "seq_id")
        payload = payload_json({"path": request.path, "optimizer": request.optimizer})
        operation = NewOperation(
            run.run_id, seq_id, names.LOAD_WEIGHTS, payload, None, run.session_id
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
        """The operation that unloads a run; they carry no sequence id and are counted here."""
        scope = names.unload_scope(run.run_id)
        return NewOperation(scope, len(earlier), names.UNLOAD_MODEL, b"", None, run.session_id)

    # Sampling

    async def _sample(self, request: types.SampleRequest) -> Entry:
        if request.sampling_session_id is None:
            raise Rejected(400, "sampling_session_id is required: create a sampling session first.")
        sampler = await self._ledger.sampler(request.sampling_session_id)
        if sampler is None:
            raise Rejected(404, f"Sampling session {request.sampling_session_id} does not exist.")
        seq_id = _required(request.seq_id, "seq_id")
        payload = request.model_dump(mode="json", exclude_none=True)
        failure = None
        try:
            info = self.model(sampler.base_model)
            spec = sample_spec(payload, names.seed_for(sampler.sampler_id, seq_id))
            check_sample(
                spec, vocab_size=info.vocab_size, max_context_length=info.max_context_length
            )
        except _USER_ERRORS as error:
            failure = _failure(error)
        return Entry(
            NewOperation(
                sampler.sampler_id,
                seq_id,
                names.SAMPLE,
                payload_json(payload),
                failure,
                sampler.session_id,
                samples=True,
            )
        )


def _required(value: int | None, field: str) -> int:
    if value is None or value < 0:
        raise Rejected(400, f"{field} is required and must be 0 or greater; got {value}.")
    return value


def _finished(session: Session) -> Rejected:
    return Rejected(
        400,
        f"Session {session.session_id} is finished ({session.finished}) and takes no new "
        "operations. Open another one, and go on from a checkpoint.",
    )


def _failure(error: Exception) -> Failure:
    return Failure(str(error), ErrorCategory.USER)
