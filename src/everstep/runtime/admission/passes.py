"""Admission of training passes: validates one and adds the inputs of its execution and replay."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from everstep.engine.errors import InputError
from everstep.engine.losses.specs import CUSTOM, LOSSES, STABLE_REINFORCE
from everstep.engine.models.info import ModelInfo
from everstep.engine.prepared_pass import ModelLimits, PreparedPass
from everstep.engine.validation import check_pass
from everstep.ledger import Failure, Run
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.admission.custom_losses import with_program
from everstep.runtime.admission.provenance import with_recorded, with_recorded_of
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed
from everstep.spool import Data, as_bytes
from everstep.wire.codecs.proto import TrainingPass, decode_training_pass, encode_training_pass
from everstep.wire.errors import ErrorCategory, WireError

_log = get_logger("everstep.losses")


@dataclass(frozen=True)
class AdmittedPass:
    """A pass as the ledger appends it.

    Attributes:
        payload: the pass in its canonical form, with the inputs that were added.
        failure: why it can't be executed, if it can't.
        uses: request ids of the recorded samples that it reads.
        match_payload: False for a retry whose first request can't be compared any more.
    """

    payload: Data
    failure: Failure | None = None
    uses: tuple[str, ...] = ()
    match_payload: bool = True


class PassAdmission:
    """Validates training passes.

    Args:
        context: of the service.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._ledger = context.ledger
        self._settings = context.settings
        self._announced: set[str] = set()

    async def admit(
        self, run: Run, info: ModelInfo, request: TrainingPass | PreparedPass
    ) -> AdmittedPass:
        """Validate a pass, and add the graph or the recorded logprobs that its loss reads."""
        if isinstance(request, PreparedPass):
            limits = ModelLimits(info.vocab_size, info.max_context_length)
            if limits in request.failures:
                return AdmittedPass(request.payload, _user_failure(request.failures[limits]))
            request = await asyncio.to_thread(_decoded, request.payload)
        recorded = request.loss_fn in LOSSES and LOSSES[request.loss_fn].recorded
        if recorded:
            retry = await self._retry(run, request)
            if retry is not None:
                return retry
        program = None
        uses: tuple[str, ...] = ()
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
                refuse_stable_reinforce=self._settings.stable_reinforce == "refuse",
            )
            if recorded:
                keep = self._settings.recorded_sample_seconds
                request, uses = await with_recorded(self._ledger, run.session_id, request, keep)
        except OperationFailed as failed:
            return _admitted(request, Failure(failed.message, failed.category))
        except (InputError, WireError) as error:
            return _admitted(request, _user_failure(str(error)))
        if request.loss_fn == STABLE_REINFORCE:
            self._announce(run.run_id)
        return AdmittedPass(encode_training_pass(request), uses=uses)

    async def _retry(self, run: Run, request: TrainingPass) -> AdmittedPass | None:
        """Return a pass as it was accepted before, or None if its sequence id is new.

        The records that it was accepted with may have expired since.
        """
        known = await self._ledger.operation_by_seq_id(run.run_id, request.seq_id)
        if known is None or known.kind not in ids.PASSES:
            return None
        if known.pruned:
            return replace(_admitted(request, known.failure), match_payload=False)
        accepted = decode_training_pass(known.payload)
        return _admitted(with_recorded_of(request, accepted), known.failure)

    def _announce(self, run_id: str) -> None:
        """Log once per run that the loss is not the hosted service's."""
        if run_id not in self._announced:
            self._announced.add(run_id)
            _log.info(
                "stable_reinforce is computed by Everstep's own definition, not the hosted "
                "service's, which is not public",
                run=run_id,
                definition=LOSSES[STABLE_REINFORCE].definition,
            )


def _decoded(payload: Data) -> TrainingPass:
    return decode_training_pass(as_bytes(payload))


def _admitted(request: TrainingPass, failure: Failure | None) -> AdmittedPass:
    return AdmittedPass(encode_training_pass(request), failure)


def _user_failure(text: str | None) -> Failure | None:
    return None if text is None else Failure(text, ErrorCategory.USER)
