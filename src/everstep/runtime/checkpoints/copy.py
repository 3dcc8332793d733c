"""Checkpoint copies: a checkpoint under its own run, in another project. No bytes are copied.

The run and its session are created for the copy and take no operations. A copy keeps kind, name,
metadata and configuration, and has its own expiry. Its manifest names the source as its parent.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, Run, SequenceConflict, Session
from everstep.runtime import ids
from everstep.runtime.absence import absent
from everstep.runtime.authorization import event
from everstep.runtime.checkpoints.catalog import expiry, id_of, parse_checkpoint
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.payloads import optimizer_of, payload_json
from everstep.vault import CheckpointId, Manifest, VaultError
from everstep.wire import types
from everstep.wire.errors import WireError

_COMMITTED = Failpoint("runtime.copy.committed", "a copy is in the vault, nothing is recorded")
_RECORDED = Failpoint("runtime.copy.recorded", "a copy is recorded, the request is not answered")
_KEYS = uuid.UUID("6f6a3b3e-6c1f-4d6e-9d53-2f0a3f1f7c11")
DETAIL = "Made by copy_weights: it holds a copy, and takes no operations."


@dataclass(frozen=True)
class _Target:
    """The run of a copy, and its session if that is created with it."""

    run_id: str
    session_id: str
    session: Session | None


class CheckpointCopier:
    """Copies checkpoints.

    Args:
        context: the service's ledger, which records copies, its vault and its catalog.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._ledger = context.ledger
        self._vault = context.vault
        self._catalog = context.catalog
        self._authorization = context.authorization

    async def copy(
        self, request: types.CopyWeightsRequest, token: str | None, idempotency_key: str | None
    ) -> str:
        """Copy a checkpoint durably. Return the copy's path.

        Args:
            request: the source and the target.
            token: the weights access token of the request, if any.
            idempotency_key: requests with the same key get the same copy, also after a restart.

        Raises:
            Rejected: the request is not valid (400), or the source does not exist (404).
            Deleted: the run of the copy was deleted.
        """
        asked = request.model_dump(exclude={"weights_access_token"})
        canonical = payload_json(asked).decode()
        key = (idempotency_key, canonical) if idempotency_key is not None else None
        try:
            known = (
                await self._ledger.checkpoint_metadata.find_copy(*key) if key is not None else None
            )
        except SequenceConflict as conflict:
            raise Rejected(400, str(conflict)) from conflict
        if known is not None:
            return known
        source = await self._source(request, token)
        target = await self._target(request, idempotency_key)
        await self._ledger.deletions.require_absent(target.run_id)
        name = request.name if request.name is not None else source.name
        copied = parse_checkpoint(CheckpointId(source.kind, target.run_id, name).path)
        path = copied.path
        if await self._ledger.run(target.run_id) is not None:
            return await self._same(copied, source, request)
        async with self._catalog.lock(source.path), self._catalog.lock(path):
            manifest = await self._commit(source, copied, request.ttl_seconds)
            _COMMITTED()
            copy = replace(
                source,
                path=path,
                run_id=target.run_id,
                name=name,
                created_at=manifest.created_at,
                expires_at=manifest.expires_at,
                public=False,
                listed=True,
                unmarked=False,
            )
            what = event("copy", path, source=source.path, project_id=_project(request))
            run = _run(copy, target, manifest)
            await self._ledger.checkpoint_metadata.record_copy(copy, run, target.session, what, key)
        _RECORDED()
        return path

    async def _source(self, request: types.CopyWeightsRequest, token: str | None) -> Checkpoint:
        try:
            self._catalog.check_ttl(request.ttl_seconds)
        except OperationFailed as failure:
            raise Rejected(400, failure.message) from failure
        try:
            await self._authorization.check(request.source_path, token)
            return await self._catalog.find(request.source_path)
        except WireError as error:
            raise Rejected(400, str(error)) from error
        except OperationFailed as failure:
            raise Rejected(404, failure.message) from failure

    async def _target(self, request: types.CopyWeightsRequest, key: str | None) -> _Target:
        if request.session_id is not None:
            if request.model_seq_id is None:
                raise Rejected(400, "model_seq_id is required with session_id.")
            if await self._ledger.session(request.session_id) is None:
                text = f"Session {request.session_id} does not exist."
                raise await absent(self._ledger, request.session_id, text)
            run_id = ids.run_id(request.session_id, request.model_seq_id)
            return _Target(run_id, request.session_id, None)
        if not request.destination_project_id:
            raise Rejected(
                400, "destination_project_id is required, or session_id and model_seq_id."
            )
        made = uuid.uuid5(_KEYS, key) if key is not None else uuid.uuid4()
        now = datetime.now(UTC)
        session = Session(
            session_id=str(made),
            user_metadata={},
            tags=[],
            sdk_version="",
            project_id=request.destination_project_id,
            display_name=None,
            created_at=now,
            last_seen_at=now,
            finished="success",
            detail=DETAIL,
            finished_at=now,
        )
        return _Target(ids.run_id(str(made), 0), str(made), session)

    async def _same(
        self, copied: CheckpointId, source: Checkpoint, request: types.CopyWeightsRequest
    ) -> str:
        """Return the copy that a run holds, or raise `Rejected` (400) if its source is another."""
        run = await self._ledger.run(copied.run_id)
        known = await self._ledger.checkpoint(copied.path)
        manifest = None
        if run is not None and run.status == "copy" and known is not None:
            manifest = await self._manifest(known)
        if manifest is None or manifest.parents[:1] != [source.path]:
            raise Rejected(
                400,
                f"model_seq_id {request.model_seq_id} of session {request.session_id} is taken; a "
                "copy needs one of its own.",
            )
        return copied.path

    async def _manifest(self, row: Checkpoint) -> Manifest | None:
        try:
            return await asyncio.to_thread(self._vault.manifest, *id_of(row))
        except VaultError:
            return None

    async def _commit(self, source: Checkpoint, copied: CheckpointId, ttl: int | None) -> Manifest:
        now = datetime.now(UTC)

        def commit() -> Manifest:
            manifest = self._vault.manifest(*id_of(source))
            copy = manifest.model_copy(
                update={
                    "run_id": copied.run_id,
                    "name": copied.name,
                    "created_at": now,
                    "expires_at": expiry(now, ttl),
                    "public": False,
                    "listed": True,
                    "request_id": None,
                    "parents": [source.path],
                    "user_metadata": source.user_metadata,
                }
            )
            self._vault.commit(copy, overwrite=True)  # one that was not recorded may be there
            return copy

        try:
            return await asyncio.to_thread(commit)
        except VaultError as error:
            raise Rejected(404, str(error)) from error


def _project(request: types.CopyWeightsRequest) -> str | None:
    return request.destination_project_id if request.session_id is None else None


def _run(copy: Checkpoint, target: _Target, manifest: Manifest) -> Run:
    """Return the row of the run that holds a copy."""
    return Run(
        run_id=copy.run_id,
        session_id=target.session_id,
        base_model=copy.base_model,
        lora=copy.lora,
        optimizer=copy.optimizer or optimizer_of(None),
        user_metadata=manifest.run_metadata,
        created_at=copy.created_at,
        last_request_at=copy.created_at,
        status="copy",
    )
