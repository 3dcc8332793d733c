"""Sessions: open, heartbeat and finish sessions, and create their samplers."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from everstep.ledger import Sampler, Session
from everstep.runtime import ids
from everstep.runtime.absence import absent
from everstep.runtime.admission.accept import Admission
from everstep.runtime.authorization import event
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.wire import types


class Sessions:
    """Opens and ends sessions, and creates samplers in them.

    Args:
        context: of the service.
        admission: looks up sessions and models.
    """

    def __init__(self, context: RuntimeContext, admission: Admission) -> None:
        self._ledger = context.ledger
        self._access = context.authorization
        self._checkpoints = context.catalog
        self._admission = admission

    async def create(
        self, request: types.CreateSessionRequest, idempotency_key: str | None
    ) -> types.CreateSessionResponse:
        """Open a session. A retry with the same key gets the same one."""
        now = datetime.now(UTC)
        session = Session(
            session_id=str(uuid.uuid4()),
            user_metadata=dict(request.user_metadata or {}),
            tags=list(request.tags or []),
            sdk_version=request.sdk_version,
            project_id=request.project_id,
            display_name=request.display_name,
            created_at=now,
            last_seen_at=now,
            finished=None,
        )
        session = await self._ledger.create_session(session, idempotency_key)
        return types.CreateSessionResponse(session_id=session.session_id)

    async def heartbeat(self, session_id: str) -> None:
        """Record that a session's client is alive.

        Raises:
            Rejected: 404 for an unknown session, 410 for a finished one.
        """
        session = await self._ledger.session(session_id)
        if session is None:
            raise await absent(self._ledger, session_id, f"Session {session_id} does not exist.")
        if session.finished is not None:
            raise Rejected(410, f"Session {session_id} is finished ({session.finished}).")
        await self._ledger.touch_session(session_id)

    async def finish(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session and delete its unnamed sampler saves. The first end counts.

        A save that is still being written is deleted afterwards, or by the next garbage collection.

        Raises:
            Rejected: 404 for an unknown session.
        """
        if await self._ledger.session(session_id) is None:
            raise await absent(self._ledger, session_id, f"Session {session_id} does not exist.")
        await self._ledger.finish_session(session_id, reason, detail)
        await self._checkpoints.remove_ended()

    async def create_sampler(
        self, request: types.CreateSamplingSessionRequest, token: str | None = None
    ) -> types.CreateSamplingSessionResponse:
        """Create a sampler on a checkpoint or a base model. A retry gets the same one.

        If its number belongs to a sampler of other weights, the new sampler gets an id of its own:
        Tinkex has two counters in a session.

        Args:
            request: names a checkpoint or a base model.
            token: the weights access token that was sent with it, if any.

        Raises:
            Rejected: 404 for an unknown session or path, 400 for an unknown model or none.
        """
        session_id = await self._admission.session_id(request.session_id)
        sampler_id = ids.sampler_id(session_id, request.sampling_session_seq_id)
        sampler = await self._sampler(sampler_id, request, token)
        if not _samples_from(sampler, request):
            subject = request.model_path or request.base_model or ""
            alias = ids.alias_sampler_id(sampler_id, subject)
            sampler = await self._sampler(alias, request, token)
        return types.CreateSamplingSessionResponse(sampling_session_id=sampler.sampler_id)

    async def _sampler(
        self, sampler_id: str, request: types.CreateSamplingSessionRequest, token: str | None
    ) -> Sampler:
        """Return the sampler with an id, creating it if there is none."""
        known = await self._ledger.sampler(sampler_id)
        if known is not None:
            return known
        await self._ledger.deletions.require_absent(sampler_id)
        base_model, path = await self.subject(request, token)
        read = event("read", path, purpose="sampling") if path is not None else None
        new = Sampler(sampler_id, request.session_id, base_model, path, datetime.now(UTC))
        return await self._ledger.create_sampler(new, read)

    async def subject(
        self, request: types.CreateSamplingSessionRequest, token: str | None
    ) -> tuple[str, str | None]:
        """Return the base model's name and the checkpoint's path, if any, to sample from.

        Raises:
            Rejected: 404 for an unknown path, 400 for an unknown model or none.
        """
        try:
            if request.model_path is None:
                return self._admission.model(request.base_model).name, None
            checkpoint = await self._checkpoints.usable(request.model_path)
            await self._access.check(checkpoint.path, token)
            self._admission.model(checkpoint.base_model)
        except OperationFailed as failure:
            status = 400 if request.model_path is None else 404
            raise Rejected(status, failure.message) from failure
        if request.base_model not in (None, checkpoint.base_model):
            raise Rejected(
                400,
                f"Checkpoint {request.model_path} was trained on {checkpoint.base_model}, not on "
                f"{request.base_model}.",
            )
        return checkpoint.base_model, checkpoint.path

    async def join_sampler(self, sampler_id: str) -> types.JoinSamplingSessionResponse:
        """Number another client of a sampler. Raises `Rejected` (404) for an unknown sampler."""
        number = await self._ledger.samples.add_client(sampler_id)
        if number is None:
            text = f"Sampling session {sampler_id} does not exist."
            raise await absent(self._ledger, sampler_id, text)
        return types.JoinSamplingSessionResponse(client_counter=number)

    async def sampler(self, sampler_id: str) -> types.GetSamplerResponse:
        """Return a sampler's model and checkpoint. Raises `Rejected` (404) for an unknown one."""
        sampler = await self._ledger.sampler(sampler_id)
        if sampler is None:
            raise await absent(self._ledger, sampler_id, f"Sampler {sampler_id} does not exist.")
        return types.GetSamplerResponse(
            sampler_id=sampler_id, base_model=sampler.base_model, model_path=sampler.model_path
        )


def _samples_from(sampler: Sampler, request: types.CreateSamplingSessionRequest) -> bool:
    """Whether a sampler has the weights that a request asks for."""
    if request.model_path is not None:
        return sampler.model_path == request.model_path
    return (sampler.model_path, sampler.base_model) == (None, request.base_model)
