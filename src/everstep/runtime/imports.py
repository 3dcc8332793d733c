"""Imports: checkpoints that were made elsewhere, under runs of their own.

<home>/imports/<id>/    an upload while it is looked at; the next start removes what a crash left

What arrives is untrusted: it is spooled within a bound, unpacked, and looked at, before the worker
makes a state of it and writes that into the vault as it writes every save. An import is recorded
once its manifest is there; one that died before that is an orphan of the vault, and is collected,
or replaced by its retry. The run takes no operations, as that of a copy.
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

from everstep.engine.info import ModelInfo
from everstep.failpoints import Failpoint
from everstep.interchange import archive
from everstep.interchange.errors import InterchangeError
from everstep.interchange.peft_config import PeftAdapter
from everstep.interchange.tensors import TensorFile
from everstep.ledger import Checkpoint, Ledger, Run, Session
from everstep.runtime import names
from everstep.runtime.access import event
from everstep.runtime.checkpoints import Checkpoints, draft, path_of, taken
from everstep.runtime.errors import OperationFailed, Rejected, WorkerLost
from everstep.runtime.payloads import optimizer_of
from everstep.runtime.worker_process import WorkerProcess
from everstep.vault import Manifest, Vault, VaultError
from everstep.wire.errors import WireError
from everstep.wire.paths import CheckpointKind, TinkerPath, validate_name
from everstep.wire.transfer import ImportQuery, ImportResponse, collection_run_id

_RECEIVED = Failpoint("runtime.import.received", "an upload is spooled, nothing came of it")
_COMMITTED = Failpoint("runtime.import.committed", "an import is in the vault, not recorded")
_RECORDED = Failpoint("runtime.import.recorded", "an import is recorded, and no one was told")
_RUNS = uuid.UUID("5f3b6f0a-2f0e-4d6b-9c55-1f2e7f0f6c3a")
_DIRECTORY = "imports"
_DETAIL = "Made by an import: it holds imported checkpoints, and takes no operations."
_PIECE = 1 << 20


@dataclass(frozen=True)
class _Upload:
    """What was sent, looked at.

    Attributes:
        directory: has its files.
        adapter: the adapter.
        manifest: what the Everstep service that it comes from says of it, if one does.
        digests: BLAKE3 of its files.
    """

    directory: Path
    adapter: PeftAdapter
    manifest: Manifest | None
    digests: dict[str, str]


class Imports:
    """Brings checkpoints in.

    Args:
        home: where uploads are spooled.
        ledger: where imports are recorded.
        vault: where they lie.
        worker: makes states of them.
        checkpoints: look-ups and locks.
        most_bytes: the largest upload that is taken.
    """

    def __init__(
        self,
        home: Path,
        ledger: Ledger,
        vault: Vault,
        worker: WorkerProcess,
        checkpoints: Checkpoints,
        most_bytes: int,
    ) -> None:
        self._directory = home / _DIRECTORY
        self._ledger = ledger
        self._vault = vault
        self._worker = worker
        self._checkpoints = checkpoints
        self._most_bytes = most_bytes
        shutil.rmtree(self._directory, ignore_errors=True)  # of uploads that died with the service

    async def bring_in(
        self, query: ImportQuery, body: AsyncIterator[bytes], idempotency_key: str | None
    ) -> ImportResponse:
        """Make a checkpoint of an upload; durable on return.

        Args:
            query: what it becomes.
            body: a tar.
            idempotency_key: a request with the same one, and the same body, makes one checkpoint.

        Raises:
            Rejected: it can't be one (400), is too large (413), or can't be now (503).
        """
        spool = self._directory / uuid.uuid4().hex
        try:
            await self._spool(body, spool)
            _RECEIVED()
            try:
                validate_name(query.name)
                upload = await asyncio.to_thread(_look_at, spool)
            except (InterchangeError, VaultError, WireError) as error:
                raise Rejected(400, str(error)) from error
            path = TinkerPath(
                _run_id(query, idempotency_key), CheckpointKind(query.kind), query.name
            )
            async with self._checkpoints.lock(path.run_id), self._checkpoints.lock(str(path)):
                return await self._settle(query, upload, path)
        finally:
            await asyncio.to_thread(shutil.rmtree, spool, ignore_errors=True)

    async def _spool(self, body: AsyncIterator[bytes], spool: Path) -> None:
        await asyncio.to_thread(spool.mkdir, parents=True)
        size = 0
        try:
            with (spool / "upload.tar").open("wb") as file:
                async for piece in body:
                    size += len(piece)
                    if size > self._most_bytes:
                        raise Rejected(
                            413,
                            f"The upload is larger than {self._most_bytes} bytes. The setting "
                            "import_bytes changes that.",
                        )
                    await asyncio.to_thread(file.write, piece)
            self._vault.check_room(2 * size)
        except OSError as error:
            raise Rejected(503, f"The upload could not be kept: {error}") from error

    async def _settle(
        self, query: ImportQuery, upload: _Upload, path: TinkerPath
    ) -> ImportResponse:
        """Answer with what is there already, or make it; both locks are held."""
        known = await self._ledger.checkpoint(str(path))
        if known is not None:
            there = await asyncio.to_thread(self._there, path)
            if there is not None and there.imported == _imported(query, upload):
                return _answer(known, there.step, [], is_new=False)
            if not query.overwrite:
                raise Rejected(400, taken(path.name, path.run_id, path.kind).message)
        base = self._base(query, upload)
        notes = _notes(upload, base)
        row, run, reply = await self._write(query, upload, path, base)
        _COMMITTED()
        what = event("import", row.path, source=query.source, size_bytes=row.size_bytes)
        await self._ledger.publication.imported(row, run, _session(run), what)
        _RECORDED()
        return _answer(row, int(reply["step"]), notes, is_new=True)

    def _there(self, path: TinkerPath) -> Manifest | None:
        try:
            return self._vault.manifest(str(path.kind), path.run_id, path.name)
        except VaultError:
            return None

    async def _write(
        self, query: ImportQuery, upload: _Upload, path: TinkerPath, base: ModelInfo
    ) -> tuple[Checkpoint, Run, dict[str, Any]]:
        """Have the worker write it; returns its row, that of its run, and what the worker said."""
        now = datetime.now(UTC)
        source = upload.manifest
        run = await self._ledger.run(path.run_id)
        has_optimizer = archive.OPTIMIZER in upload.digests
        if query.kind == "sampler" and has_optimizer:
            raise Rejected(400, "kind: a sampler checkpoint holds no optimizer state.")
        row = Checkpoint(
            path=str(path),
            run_id=path.run_id,
            kind=query.kind,
            name=path.name,
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
        command = {
            "command": "import",
            "model": base.name,
            "directory": str(upload.directory),
            "step": source.step if source is not None else query.step,
            "seed": source.lora.get("seed", 0) if source is not None else 0,
            "lora": run.lora if run is not None else None,
            "manifest": manifest,
        }
        reply = await self._call(command)
        saved = {**vars(row), "lora": reply["lora"], "size_bytes": reply["size_bytes"]}
        return Checkpoint(**saved), run or _run(path.run_id, saved, now), reply

    async def _call(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            call = await self._worker.call(command, b"", await self._worker.wait_ready())
            return dict((await call.done).header)
        except OperationFailed as failure:
            raise Rejected(400 if failure.category == "user" else 503, failure.message) from failure
        except WorkerLost as lost:
            raise Rejected(503, f"The import was broken off: {lost.reason}. Try again.") from lost

    def _base(self, query: ImportQuery, upload: _Upload) -> ModelInfo:
        """The base model; raises `Rejected` (400) unless it is clear, and served."""
        models = self._worker.models
        named = upload.manifest.base_model if upload.manifest else upload.adapter.base_model
        fits = [info for info in models.values() if named in (info.name, info.source)]
        if query.base_model is None:
            if fits:
                return fits[0]
            raise Rejected(
                400,
                f"base_model_name_or_path: {named!r:.200} is not served here. Served: "
                f"{', '.join(sorted(models))}. If it is one of them by another name, say which "
                "(base_model; --base-model on the command line).",
            )
        if query.base_model not in models:
            raise Rejected(
                400,
                f"base_model: {query.base_model!r:.200} is not served here. Served: "
                f"{', '.join(sorted(models))}.",
            )
        if fits and models[query.base_model] not in fits:
            raise Rejected(
                400,
                f"base_model_name_or_path: the adapter was trained on {named}, not on "
                f"{query.base_model}. Leave base_model out.",
            )
        return models[query.base_model]


def _look_at(spool: Path) -> _Upload:
    """Unpack an upload and check it as far as that goes without a model."""
    directory = spool / "files"
    directory.mkdir()
    archive.unpack(spool / "upload.tar", directory)
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
    return _Upload(directory, adapter, manifest, digests)


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
    return names.run_id(str(made), 0)


def _imported(query: ImportQuery, upload: _Upload) -> dict[str, str]:
    """What a manifest says of an import: where it comes from, and what was sent."""
    imported = {"from": query.source or "an upload", **upload.digests}
    if query.saved_at is not None:
        imported["saved_at"] = query.saved_at.isoformat()
    return imported


def _parents(query: ImportQuery, source: Manifest | None) -> list[str]:
    """What it is a copy of: by its own manifest, else as whoever sent it says."""
    path = path_of(source.id) if source is not None else None
    known = path or query.source
    return [known] if known else []


def _optimizer(source: Manifest | None) -> dict[str, Any] | None:
    return source.optimizer if source is not None else None


def _metadata(query: ImportQuery, source: Manifest | None) -> dict[str, str] | None:
    if query.user_metadata is None:
        return source.user_metadata if source is not None else None
    try:
        metadata = json.loads(query.user_metadata)
    except ValueError as error:
        raise Rejected(400, f"user_metadata is no JSON: {error}") from error
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Rejected(400, "user_metadata has to be a JSON object whose values are texts.")
    return metadata


def _notes(upload: _Upload, base: ModelInfo) -> list[str]:
    notes = []
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
