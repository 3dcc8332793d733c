"""Sessions and their samplers."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from everstep.ledger import Ledger, Sampler, Session
from everstep.runtime import names
from everstep.runtime.accept import Acceptance
from everstep.runtime.access import Access, event
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.wire import types


class Sessions:
    """Opens and ends sessions, and creates the samplers in them."""

    def __init__(
        self, ledger: Ledger, checkpoints: Checkpoints, acceptance: Acceptance, access: Access
    ) -> None:
        self._ledger = ledger
        self._access = access
        self._checkpoints = checkpoints
        self._acceptance = acceptance

    async def create(
        self, request: types.CreateSessionRequest, idempotency_key: str | None
    ) -> types.CreateSessionResponse:
        """Open a session; a retry with the same key gets the same one."""
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
        """Note that a session's client is alive.

        Raises:
            Rejected: 404 for an unknown session, 410 for a finished one.
        """
        session = await self._ledger.session(session_id)
        if session is None:
            raise Rejected(404, f"Session {session_id} does not exist.")
        if session.finished is not None:
            raise Rejected(410, f"Session {session_id} is finished ({session.finished}).")
        await self._ledger.touch_session(session_id)

    async def finish(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session; its first end counts. Its unnamed sampler saves are deleted.

        One that is being written is deleted when it is there, or by the next collection.
        """
        if await self._ledger.session(session_id) is None:
            raise Rejected(404, f"Session {session_id} does not exist.")
        await self._ledger.finish_session(session_id, reason, detail)
        await self._checkpoints.remove_ended()

    async def create_sampler(
        self, request: types.CreateSamplingSessionRequest, token: str | None = None
    ) -> types.CreateSamplingSessionResponse:
        """Create a sampler on a checkpoint or a base model; a retry gets the same one.

        A number that was given to a sampler of something else is no retry: Tinkex has two counters
        in a session. Then this sampler gets an id of its own.

        Args:
            request: names the one or the other.
            token: the weights access token that was sent with it, if any.

        Raises:
            Rejected: 404 for an unknown session or path, 400 for an unknown model or none.
        """
        session_id = await self._acceptance.session_id(request.session_id)
        sampler_id = names.sampler_id(session_id, request.sampling_session_seq_id)
        sampler = await self._sampler(sampler_id, request, token)
        if not _samples_from(sampler, request):
            subject = request.model_path or request.base_model or ""
            twin = names.twin_sampler_id(sampler_id, subject)
            sampler = await self._sampler(twin, request, token)
        return types.CreateSamplingSessionResponse(sampling_session_id=sampler.sampler_id)

    async def _sampler(
        self, sampler_id: str, request: types.CreateSamplingSessionRequest, token: str | None
    ) -> Sampler:
        """The sampler with an id; one is created for the request if there is none."""
        known = await self._ledger.sampler(sampler_id)
        if known is not None:
            return known
        base_model, path = await self.subject(request, token)
        read = event("read", path, purpose="sampling") if path is not None else None
        new = Sampler(sampler_id, request.session_id, base_model, path, datetime.now(UTC))
        return await self._ledger.create_sampler(new, read)

    async def subject(
        self, request: types.CreateSamplingSessionRequest, token: str | None
    ) -> tuple[str, str | None]:
        """What is sampled from: the base model's name and the checkpoint's path, if any.

        Raises:
            Rejected: 404 for an unknown path, 400 for an unknown model or none.
        """
        try:
            if request.model_path is None:
                return self._acceptance.model(request.base_model).name, None
            checkpoint = await self._checkpoints.usable(request.model_path)
            await self._access.check(checkpoint.path, token)
            self._acceptance.model(checkpoint.base_model)
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
        """Give another client of a sampler its number; raises `Rejected` (404) for no sampler."""
        number = await self._ledger.samples.join(sampler_id)
        if number is None:
            raise Rejected(404, f"Sampling session {sampler_id} does not exist.")
        return types.JoinSamplingSessionResponse(client_counter=number)

    async def sampler(self, sampler_id: str) -> types.GetSamplerResponse:
        """What a sampler samples from; raises `Rejected` (404) for an unknown one."""
        sampler = await self._ledger.sampler(sampler_id)
        if sampler is None:
            raise Rejected(404, f"Sampler {sampler_id} does not exist.")
        return types.GetSamplerResponse(
            sampler_id=sampler_id, base_model=sampler.base_model, model_path=sampler.model_path
        )


def _samples_from(sampler: Sampler, request: types.CreateSamplingSessionRequest) -> bool:
    """Whether a sampler is what a request asks for."""
    if request.model_path is not None:
        return sampler.model_path == request.model_path
    return (sampler.model_path, sampler.base_model) == (None, request.base_model)
