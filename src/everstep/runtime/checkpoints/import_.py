"""Checkpoint import: checkpoints that were made elsewhere, under their own runs.

<home>/imports/<id>/    an upload while it is checked. The next start removes leftovers

Uploads are untrusted. An upload is spooled within a size limit, unpacked and checked. Then the
worker builds a state from it and writes that to the vault like a save. The import is recorded once
its manifest exists. An import that died before that is an orphan in the vault, which is collected,
or replaced by a retry. Like the run of a copy, the run of an import takes no operations.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blake3 import blake3

from everstep.engine.models.info import ModelInfo
from everstep.failpoints import Failpoint
from everstep.interchange import archive
from everstep.interchange.errors import InterchangeError
from everstep.interchange.peft_config import PeftAdapter
from everstep.interchange.tensors import TensorFile
from everstep.json_values import check_json
from everstep.ledger import Checkpoint, Run, Session
from everstep.runtime import ids
from everstep.runtime.authorization import event
from everstep.runtime.checkpoints.catalog import draft, taken
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, Rejected, WorkerLost
from everstep.runtime.maintenance.pins import send_pinned
from everstep.runtime.payloads import optimizer_of
from everstep.runtime.workers.base import not_served
from everstep.vault import CheckpointId, Manifest, VaultError
from everstep.wire.errors import WireError
from everstep.wire.messages.transfer import ImportQuery, ImportResponse, collection_run_id
from everstep.wire.paths import validate_name
from everstep.worker.protocol.messages import AdapterImported, ImportAdapter

_RECEIVED = Failpoint("runtime.import.received", "an upload is spooled, and not checked")
_COMMITTED = Failpoint("runtime.import.committed", "an import is in the vault, not recorded")
_RECORDED = Failpoint(
    "runtime.import.recorded", "an import is recorded, the request is not answered"
)
_RUNS = uuid.UUID("5f3b6f0a-2f0e-4d6b-9c55-1f2e7f0f6c3a")
_DIRECTORY = "imports"
_DETAIL = "Made by an import: it holds imported checkpoints, and takes no operations."
_PIECE = 1 << 20


@dataclass(frozen=True)
class _Upload:
    """A checked upload.

    Attributes:
        directory: the directory with its files.
        adapter: the adapter.
        manifest: the manifest of the Everstep service that it comes from, if any.
        digests: BLAKE3 of each file.
        left_out: names of further files, which a checkpoint does not have.
    """

    directory: Path
    adapter: PeftAdapter
    manifest: Manifest | None
    digests: dict[str, str]
    left_out: list[str]


class CheckpointImporter:
    """Imports checkpoints.

    Args:
        context: the service's home, which holds spooled uploads, its ledger, which records imports,
            its workers, which write them, its vault, catalog and settings.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._directory = context.home / _DIRECTORY
        self._ledger = context.ledger
        self._vault = context.vault
        self._workers = context.workers
        self._pins = context.pins
        self._catalog = context.catalog
        self._max_bytes = context.settings.import_bytes
        shutil.rmtree(self._directory, ignore_errors=True)  # of uploads that died with the service

    async def import_checkpoint(
        self, query: ImportQuery, body: AsyncIterator[bytes], idempotency_key: str | None
    ) -> ImportResponse:
        """Create a checkpoint from an upload. Durable on return.

        Args:
            query: kind, name and metadata of the checkpoint.
            body: a tar.
            idempotency_key: requests with the same key and body create one checkpoint.

        Raises:
            Rejected: the upload is not valid (400), is too large (413), or can't be imported now
                (503).
        """
        spool = self._directory / uuid.uuid4().hex
        try:
            await self._spool(body, spool)
            _RECEIVED()
            try:
                validate_name(query.name)
                upload = await asyncio.to_thread(_check_upload, spool)
            except (InterchangeError, VaultError, WireError) as error:
                raise Rejected(400, str(error)) from error
            target = CheckpointId(query.kind, _run_id(query, idempotency_key), query.name)
            async with self._catalog.lock(target.run_id), self._catalog.lock(target.path):
                return await self._find_or_create(query, upload, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, spool, ignore_errors=True)

    async def _spool(self, body: AsyncIterator[bytes], spool: Path) -> None:
        await asyncio.to_thread(spool.mkdir, parents=True)
        size = 0
        try:
            with (spool / "upload.tar").open("wb") as file:
                async for piece in body:
                    size += len(piece)
                    if size > self._max_bytes:
                        raise Rejected(
                            413,
                            f"The upload is larger than {self._max_bytes} bytes. The setting "
                            "import_bytes changes that.",
                        )
                    await asyncio.to_thread(file.write, piece)
            self._vault.check_free_space(2 * size)
        except OSError as error:
            raise Rejected(503, f"The upload could not be kept: {error}") from error

    async def _find_or_create(
        self, query: ImportQuery, upload: _Upload, target: CheckpointId
    ) -> ImportResponse:
        """Return the existing import, or create it. The caller holds both locks."""
        await self._revive(target.run_id)
        known = await self._ledger.checkpoint(target.path)
        if known is not None:
            there = await asyncio.to_thread(self._there, target)
            if there is not None and there.imported == _imported(query, upload):
                return _answer(known, there.step, [], is_new=False)
            if not query.overwrite:
                raise Rejected(400, taken(target).message)
        base = self._base(query, upload)
        notes = _notes(upload, base)
        row, run, reply = await self._write(query, upload, target, base)
        _COMMITTED()
        what = event("import", row.path, source=query.source, size_bytes=row.size_bytes)
        await self._ledger.checkpoint_metadata.record_import(row, run, _session(run), what)
        _RECORDED()
        return _answer(row, reply.step, notes, is_new=True)

    async def _revive(self, run_id: str) -> None:
        """Allow a run that was deleted to be imported again: a collection has one id for ever."""
        tombstone = await self._ledger.deletions.find(run_id)
        if tombstone is not None:
            await self._catalog.finish_deletions()
            await self._ledger.deletions.forget(run_id, run_id.partition(":")[0])

    def _there(self, target: CheckpointId) -> Manifest | None:
        try:
            return self._vault.manifest(*target)
        except VaultError:
            return None

    async def _write(
        self, query: ImportQuery, upload: _Upload, target: CheckpointId, base: ModelInfo
    ) -> tuple[Checkpoint, Run, AdapterImported]:
        """Have a worker write it. Return its row, the row of its run, and the worker's reply."""
        now = datetime.now(UTC)
        source = upload.manifest
        run = await self._ledger.run(target.run_id)
        has_optimizer = archive.OPTIMIZER in upload.digests
        if query.kind == "sampler" and has_optimizer:
            raise Rejected(400, "kind: a sampler checkpoint holds no optimizer state.")
        row = Checkpoint(
            path=target.path,
            run_id=target.run_id,
            kind=target.kind,
            name=target.name,
            created_at=now,
            size_bytes=0,
            base_model=base.name,
            lora={},
            optimizer=_optimizer(source) if has_optimizer else None,
            user_metadata=_metadata(query, source),
            expires_at=None,
        )
        manifest = draft(
            row,
            base_fingerprint=base.fingerprint,
            run_metadata={},
            position=0,
            request_id=None,
            parents=_parents(query, source),
            imported=_imported(query, upload),
        )
        reply = await self._import(
            ImportAdapter(
                model=base.name,
                directory=str(upload.directory),
                step=source.step if source is not None else query.step,
                seed=source.lora.get("seed", 0) if source is not None else 0,
                lora=run.lora if run is not None else None,
                manifest=manifest,
            )
        )
        saved = {**vars(row), "lora": reply.lora, "size_bytes": reply.size_bytes}
        return Checkpoint(**saved), run or _run(target.run_id, saved, now), reply

    async def _import(self, command: ImportAdapter) -> AdapterImported:
        try:
            lease = await self._workers.for_model(command.model)
            call = await send_pinned(self._pins, lambda: lease.call(command))
            return await asyncio.shield(call.done)  # it goes on when the client has left
        except OperationFailed as failure:
            raise Rejected(400 if failure.category == "user" else 503, failure.message) from failure
        except WorkerLost as lost:
            raise Rejected(503, f"The import was broken off: {lost.reason}. Try again.") from lost

    def _base(self, query: ImportQuery, upload: _Upload) -> ModelInfo:
        """Return the base model, or raise `Rejected` (400) if it is ambiguous or not served."""
        models = self._workers.models
        named = upload.manifest.base_model if upload.manifest else upload.adapter.base_model
        fits = [info for info in models.values() if named in (info.name, info.source)]
        if query.base_model is None:
            if fits:
                return fits[0]
            raise Rejected(
                400,
                f"base_model_name_or_path: {not_served(self._workers, str(named))} If it is one of "
                "them by another name, say which (base_model; --base-model on the command line).",
            )
        if query.base_model not in models:
            raise Rejected(400, f"base_model: {not_served(self._workers, query.base_model)}")
        if fits and models[query.base_model] not in fits:
            raise Rejected(
                400,
                f"base_model_name_or_path: the adapter was trained on {named}, not on "
                f"{query.base_model}. Leave base_model out.",
            )
        return models[query.base_model]


def _check_upload(spool: Path) -> _Upload:
    """Unpack an upload and check everything that needs no model."""
    directory = spool / "files"
    directory.mkdir()
    left_out = archive.unpack(spool / "upload.tar", directory)
    (spool / "upload.tar").unlink()
    adapter = PeftAdapter.open(directory)
    for name in (archive.OPTIMIZER, archive.GRADIENTS):
        if (directory / name).exists():
            TensorFile(directory / name)
    digests = {path.name: _digest(path) for path in sorted(directory.iterdir())}
    manifest = None
    if digests.pop(archive.MANIFEST, None):
        data = (directory / archive.MANIFEST).read_bytes()
        manifest = Manifest.decode(data, "the upload's manifest.json")
        _check_values(manifest.model_dump(mode="json"), archive.MANIFEST)
        for name, digest in digests.items():
            if name not in manifest.files or manifest.files[name].blake3 != digest:
                raise InterchangeError(
                    f"{name} is not what the manifest in the upload says: it was changed, or "
                    "damaged on its way."
                )
    elif archive.OPTIMIZER in digests:
        raise InterchangeError(
            f"{archive.OPTIMIZER} without its manifest.json: nobody knows its step. Leave it out."
        )
    return _Upload(directory, adapter, manifest, digests, left_out)


def _digest(path: Path) -> str:
    hasher = blake3()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            hasher.update(piece)
    return hasher.hexdigest()


def _run_id(query: ImportQuery, key: str | None) -> str:
    if query.collection is not None:
        return collection_run_id(query.collection)
    made = uuid.uuid5(_RUNS, key) if key is not None else uuid.uuid4()
    return ids.run_id(str(made), 0)


def _imported(query: ImportQuery, upload: _Upload) -> dict[str, str]:
    """Return a manifest's ``imported``: the source and the hashes of the uploaded files."""
    imported = {"from": query.source or "an upload", **upload.digests}
    if query.saved_at is not None:
        imported["saved_at"] = query.saved_at.isoformat()
    return imported


def _parents(query: ImportQuery, source: Manifest | None) -> list[str]:
    """Return the checkpoint's source: from its own manifest, else from the request."""
    known = query.source
    if source is not None and source.id.has_path:
        known = source.id.path
    return [known] if known else []


def _optimizer(source: Manifest | None) -> dict[str, Any] | None:
    return source.optimizer if source is not None else None


def _metadata(query: ImportQuery, source: Manifest | None) -> dict[str, str] | None:
    if query.user_metadata is None:
        return source.user_metadata if source is not None else None
    try:
        metadata = json.loads(query.user_metadata)
    except (ValueError, RecursionError) as error:
        raise Rejected(400, f"user_metadata is no JSON: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Rejected(400, "user_metadata has to be a JSON object whose values are texts.")
    _check_values(metadata, "user_metadata")
    return metadata


def _check_values(content: dict[str, Any], where: str) -> None:
    """Raise `Rejected` (400) for what could be stored, but not served back to every client."""
    try:
        check_json(content, where)
    except ValueError as error:
        raise Rejected(400, str(error)) from error


def _notes(upload: _Upload, base: ModelInfo) -> list[str]:
    notes = archive.left_out_note(upload.left_out)
    if upload.adapter.dropout:
        notes.append(
            f"lora_dropout {upload.adapter.dropout} is not applied when training goes on: runs "
            "have none."
        )
    if upload.manifest is not None and upload.manifest.base_fingerprint != base.fingerprint:
        notes.append(
            f"{base.name} is not the same here, bit for bit, as where this was trained (other "
            "weights, or another dtype): results will differ."
        )
    return notes


def _run(run_id: str, saved: dict[str, Any], now: datetime) -> Run:
    return Run(
        run_id=run_id,
        session_id=run_id.partition(":")[0],
        base_model=saved["base_model"],
        lora=saved["lora"],
        optimizer=saved["optimizer"] or optimizer_of(None),
        user_metadata={},
        created_at=now,
        last_request_at=now,
        status="copy",
    )


def _session(run: Run) -> Session:
    return Session(
        session_id=run.session_id,
        user_metadata={},
        tags=[],
        sdk_version="",
        project_id=None,
        display_name=None,
        created_at=run.created_at,
        last_seen_at=run.created_at,
        finished="success",
        detail=_DETAIL,
        finished_at=run.created_at,
    )


def _answer(row: Checkpoint, step: int, notes: list[str], *, is_new: bool) -> ImportResponse:
    return ImportResponse(
        tinker_path=row.path,
        size_bytes=row.size_bytes,
        step=step,
        has_optimizer=row.optimizer is not None,
        is_new=is_new,
        notes=notes,
    )
