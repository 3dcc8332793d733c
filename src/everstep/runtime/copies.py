"""Copies: a checkpoint under a run of its own, in another project. No bytes are copied.

The run and its session are made for the copy and take no operations: a copy is loaded, not trained
on. It keeps kind, name, metadata and configuration, and gets a lifetime of its own; its manifest
names the checkpoint that it was made of as its parent.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from everstep.failpoints import Failpoint
from everstep.ledger import Checkpoint, Ledger, Run, SequenceConflict, Session
from everstep.runtime import names
from everstep.runtime.access import Access, event
from everstep.runtime.checkpoints import Checkpoints, expiry
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.payloads import optimizer_of, payload_json
from everstep.vault import Manifest, Vault, VaultError
from everstep.wire import types
from everstep.wire.errors import WireError
from everstep.wire.paths import CheckpointKind, TinkerPath, parse_path

_COMMITTED = Failpoint("runtime.copy.committed", "a copy is in the vault, nothing is recorded")
_RECORDED = Failpoint("runtime.copy.recorded", "a copy is recorded, and no one was told")
_KEYS = uuid.UUID("6f6a3b3e-6c1f-4d6e-9d53-2f0a3f1f7c11")
DETAIL = "Made by copy_weights: it holds a copy, and takes no operations."


@dataclass(frozen=True)
class _Place:
    """Where a copy goes: its run, and the session if that is made for it."""

    run_id: str
    session_id: str
    session: Session | None


class Copies:
    """Copies checkpoints.

    Args:
        ledger: where copies are recorded.
        vault: where they lie.
        checkpoints: finds what is to be copied.
        access: says who may read it.
    """

    def __init__(
        self, ledger: Ledger, vault: Vault, checkpoints: Checkpoints, access: Access
    ) -> None:
        self._ledger = ledger
        self._vault = vault
        self._checkpoints = checkpoints
        self._access = access

    async def copy(
        self, request: types.CopyWeightsRequest, token: str | None, idempotency_key: str | None
    ) -> str:
        """Copy a checkpoint durably; returns the copy's path.

        Args:
            request: what to copy, and where to.
            token: the weights access token that was sent with it, if any.
            idempotency_key: a request with the same one gets the same copy, also after a restart.

        Raises:
            Rejected: the request is wrong (400), or what it names isn't there (404).
        """
        asked = request.model_dump(exclude={"weights_access_token"})
        canonical = payload_json(asked).decode()
        key = (idempotency_key, canonical) if idempotency_key is not None else None
        try:
            known = await self._ledger.publication.copied(*key) if key is not None else None
        except SequenceConflict as conflict:
            raise Rejected(400, str(conflict)) from conflict
        if known is not None:
            return known
        source = await self._source(request, token)
        place = await self._place(request, idempotency_key)
        kind = CheckpointKind(source.kind)
        name = request.name if request.name is not None else source.name
        path = str(parse_path(str(TinkerPath(place.run_id, kind, name))))
        if await self._ledger.run(place.run_id) is not None:
            return await self._same(path, source, request)
        async with self._checkpoints.lock(source.path), self._checkpoints.lock(path):
            manifest = await self._commit(source, place, name, request.ttl_seconds)
            _COMMITTED()
            copy = replace(
                source,
                path=path,
                run_id=place.run_id,
                name=name,
                created_at=manifest.created_at,
                expires_at=manifest.expires_at,
                public=False,
                listed=True,
                unmarked=False,
            )
            what = event("copy", path, source=source.path, project_id=_project(request))
            run = _run(copy, place, manifest)
            await self._ledger.publication.copy(copy, run, place.session, what, key)
        _RECORDED()
        return path

    async def _source(self, request: types.CopyWeightsRequest, token: str | None) -> Checkpoint:
        try:
            self._checkpoints.check_ttl(request.ttl_seconds)
        except OperationFailed as failure:
            raise Rejected(400, failure.message) from failure
        try:
            await self._access.check(request.source_path, token)
            return await self._checkpoints.find(request.source_path)
        except WireError as error:
            raise Rejected(400, str(error)) from error
        except OperationFailed as failure:
            raise Rejected(404, failure.message) from failure

    async def _place(self, request: types.CopyWeightsRequest, key: str | None) -> _Place:
        if request.session_id is not None:
            if request.model_seq_id is None:
                raise Rejected(400, "model_seq_id is required with session_id.")
            if await self._ledger.session(request.session_id) is None:
                raise Rejected(404, f"Session {request.session_id} does not exist.")
            run_id = names.run_id(request.session_id, request.model_seq_id)
            return _Place(run_id, request.session_id, None)
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
        return _Place(names.run_id(str(made), 0), str(made), session)

    async def _same(self, path: str, source: Checkpoint, request: types.CopyWeightsRequest) -> str:
        """The copy that a run holds already; raises `Rejected` (400) if it is another's."""
        run = await self._ledger.run(parse_path(path).run_id)
        known = await self._ledger.checkpoint(path)
        manifest = None
        if run is not None and run.status == "copy" and known is not None:
            manifest = await self._manifest(known)
        if manifest is None or manifest.parents[:1] != [source.path]:
            raise Rejected(
                400,
                f"model_seq_id {request.model_seq_id} of session {request.session_id} is taken; a "
                "copy needs one of its own.",
            )
        return path

    async def _manifest(self, row: Checkpoint) -> Manifest | None:
        try:
            return await asyncio.to_thread(self._vault.manifest, row.kind, row.run_id, row.name)
        except VaultError:
            return None

    async def _commit(
        self, source: Checkpoint, place: _Place, name: str, ttl: int | None
    ) -> Manifest:
        now = datetime.now(UTC)

        def commit() -> Manifest:
            with self._vault.held():  # until the copy names the files, its source has to
                manifest = self._vault.manifest(source.kind, source.run_id, source.name)
                copy = manifest.model_copy(
                    update={
                        "run_id": place.run_id,
                        "name": name,
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


def _run(copy: Checkpoint, place: _Place, manifest: Manifest) -> Run:
    """The row of the run that holds a copy."""
    return Run(
        run_id=copy.run_id,
        session_id=place.session_id,
        base_model=copy.base_model,
        lora=copy.lora,
        optimizer=copy.optimizer or optimizer_of(None),
        user_metadata=manifest.run_metadata,
        created_at=copy.created_at,
        last_request_at=copy.created_at,
        status="copy",
    )
