"""Runtime: accepts requests durably, dispatches them, and returns their results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path

from everstep.engine.models.info import ModelInfo
from everstep.failpoints import Failpoint
from everstep.ledger import Ledger, NewOperation, Operation, SequenceConflict, SessionFinished
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.admission.accept import Admission, Entry, Request
from everstep.runtime.admission.gaps import check_not_far_ahead, skip_gap
from everstep.runtime.authorization import Authorization
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.checkpoints.copy import CheckpointCopier
from everstep.runtime.checkpoints.details import CheckpointDetails
from everstep.runtime.checkpoints.downloads import Downloads
from everstep.runtime.checkpoints.import_ import CheckpointImporter
from everstep.runtime.checkpoints.metadata import CheckpointMetadata
from everstep.runtime.checkpoints.signed_urls import SignedUrls
from everstep.runtime.context import RuntimeContext
from everstep.runtime.deletion import Deletion
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.execution.futures import future_of
from everstep.runtime.execution.scheduler import Scheduler
from everstep.runtime.maintenance.background import BackgroundMaintenance
from everstep.runtime.maintenance.on_request import VaultMaintenance
from everstep.runtime.model_record import record_models
from everstep.runtime.queries.audit import AuditQueries
from everstep.runtime.queries.models import ModelQueries
from everstep.runtime.queries.results import Results
from everstep.runtime.queries.runs import RunQueries
from everstep.runtime.queries.sessions import SessionQueries
from everstep.runtime.queries.traces import Traces
from everstep.runtime.sampling.openai import TextCompletions
from everstep.runtime.sampling.stream import SampleEvent
from everstep.runtime.sessions import Sessions
from everstep.runtime.settings import Settings
from everstep.runtime.workers.base import PoolFactory, not_served
from everstep.runtime.workers.local_process import local_process_pool
from everstep.vault import open_vault
from everstep.vault.open import set_location
from everstep.wire import types
from everstep.worker.protocol.tokenizer_files import tokenizer_files

_log = get_logger("everstep.runtime")
_VALIDATED = Failpoint("runtime.accept.validated", "a request is sound, and not in the ledger")
_ACCEPTED = Failpoint(
    "runtime.accept.accepted", "a request is in the ledger, and not yet acknowledged"
)


class Runtime:
    """The runs, samplers and futures of one service on one home directory.

    Attributes:
        sessions: opens and ends sessions, and creates samplers.
        sampling: executes, streams and cancels samples.
        batch_poll: polls for all samples of a client.
        text_completions: samplers by a model's name, for the OpenAI API.
        authorization: decides who may read a checkpoint.
        catalog: look-up and deletion of checkpoints.
        checkpoint_metadata: expiry, publication and tags of checkpoints.
        checkpoint_copier: copies checkpoints into other projects.
        checkpoint_importer: imports adapters from elsewhere.
        checkpoint_details: files and integrity of a checkpoint.
        downloads: download addresses of checkpoints' files.
        vault_maintenance: garbage collection and pruning on request.
        model_queries: served models, and the models of runs.
        run_queries: runs and checkpoints.
        session_queries: sessions.
        audit_queries: audit log and storage.
        results: results that are left in the payload log.
        traces: timelines of sessions.
        deletion: deletes runs and sessions.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._context = context
        self._ledger = context.ledger
        self._admission = Admission(context)
        self._scheduler = Scheduler(context)
        self._stopping = False
        self._recording: asyncio.Task[None] | None = None
        self.authorization = context.authorization
        self.catalog = context.catalog
        self.sampling = self._scheduler.sampling
        self.batch_poll = self._scheduler.batch_poll
        self.sessions = Sessions(context, self._admission)
        self.text_completions = TextCompletions(context, self.sessions)
        self.checkpoint_metadata = CheckpointMetadata(context)
        self._maintenance = BackgroundMaintenance(context, self.checkpoint_metadata)
        self.model_queries = ModelQueries(context, self._admission)
        self.run_queries = RunQueries(context.ledger)
        self.session_queries = SessionQueries(context.ledger)
        self.checkpoint_copier = CheckpointCopier(context)
        self.checkpoint_importer = CheckpointImporter(context)
        self.vault_maintenance = VaultMaintenance(context)
        self.checkpoint_details = CheckpointDetails(
            context.vault, context.catalog, context.authorization, context.workers
        )
        self.audit_queries, self.results = AuditQueries(context.ledger), Results(context.ledger)
        links = SignedUrls(context.home)
        self.traces, self.downloads = Traces(context, links), Downloads(context, links)
        self.deletion = Deletion(context, self._scheduler, self.traces)

    @classmethod
    async def open(
        cls,
        home: Path,
        models: Mapping[str, str],
        settings: Settings,
        vault_url: str | None = None,
        open_pool: PoolFactory = local_process_pool,
    ) -> Runtime:
        """Open a home directory, start its workers, and resume unfinished operations.

        Returns at once: models are loaded and runs are brought back while the service answers.

        Args:
            home: directory that holds everything the service keeps. Created if it is absent.
            models: the served models: name → directory, hub id or ``everstep/pico``.
            settings: limits and intervals.
            vault_url: the bucket that holds the vault, or None for the vault that the home has.
            open_pool: creates the workers of the home. It isn't started yet.

        Raises:
            LedgerLocked: another service uses the home.
            VaultError: the home can't have that vault.
            StoreFailed: the bucket does not answer, or can't hold a vault.
        """
        await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
        ledger = await Ledger.open(home / "ledger.sqlite")
        try:
            await asyncio.to_thread(set_location, home, vault_url)
            retry = settings.vault_retry_seconds
            vault = await asyncio.to_thread(open_vault, home, writer=False, retry_seconds=retry)
            workers = open_pool(home, models, settings)
            catalog = CheckpointCatalog(ledger, vault, settings)
            access = Authorization(ledger)
            context = RuntimeContext(home, ledger, vault, workers, catalog, settings, access)
            runtime = cls(context)
            await catalog.resume_deletions()
            await catalog.follow_quarantine()
            await runtime.checkpoint_metadata.write_unwritten()
            await runtime._scheduler.resume()
        except BaseException:
            await ledger.close()
            raise
        workers.start()
        runtime._recording = asyncio.create_task(runtime._record_models(), name="record models")
        runtime._maintenance.start()
        return runtime

    async def _record_models(self) -> None:
        """Record the served models for commands that read the home, once they are loaded."""
        with suppress(
            OperationFailed
        ):  # none can be served: a request that needs one fails with the reason
            await self.started()
            models = self._context.workers.models
            await asyncio.to_thread(record_models, self._context.home, models)

    async def started(self) -> None:
        """Wait until models are loaded.

        Raises:
            OperationFailed: a model can't be loaded, and the service can't serve.
        """
        await self._context.workers.started()

    async def loaded(self) -> None:
        """Wait until models are loaded. Raises `Rejected` (503) if they can't be."""
        try:
            await self.started()
        except OperationFailed as failure:
            raise Rejected(503, failure.message) from failure

    @property
    def ready(self) -> bool:
        """Whether the service can execute requests now."""
        return self._context.workers.ready and not self._stopping

    @property
    def settings(self) -> Settings:
        """Limits and intervals."""
        return self._context.settings

    @property
    def models(self) -> list[ModelInfo]:
        """The served models."""
        return list(self._context.workers.models.values())

    @property
    def refused_models(self) -> dict[str, str]:
        """The models that can't be served, by name, with the reason."""
        return dict(self._context.workers.refused)

    async def tokenizer_files(self, model_name: str) -> dict[str, bytes]:
        """Return the files of a served model's tokenizer, by name.

        Args:
            model_name: the model's name, or the source of its tokenizer.

        Raises:
            Rejected: the model is not served (404).
        """
        await self.loaded()
        for info in self._context.workers.models.values():
            if model_name in (info.name, info.tokenizer_id):
                return await asyncio.to_thread(tokenizer_files, self._context.home, info.name)
        raise Rejected(404, not_served(self._context.workers, model_name))

    async def close(self) -> None:
        """Snapshot the runs and end the workers, within the bound of the settings."""
        self._stopping = True
        if self._recording is not None:
            if not self._context.workers.models:
                self._recording.cancel()
            await asyncio.wait([self._recording])
        await self._maintenance.close()
        await self.sampling.close()
        await self.traces.close()
        await self._scheduler.runs.close()
        await self._context.workers.close()
        await self._ledger.close()

    async def submit(
        self,
        request: Request | types.UnloadModelRequest,
        *,
        in_order: bool = False,
        patient: bool = False,
    ) -> types.UntypedAPIFuture:
        """Accept a request durably and dispatch it.

        Args:
            request: a typed request of the wire.
            in_order: the client sends a run's operations one at a time, so sequence ids that it
                skipped before this one are never sent.
            patient: a sample waits for a free slot before it is refused.

        Returns:
            The future. A retry of the same request gets the same one.

        Raises:
            Rejected: its session, run or sampler is unknown, its sequence id was used for another
                request, or no slot is free for a sample (429).
        """
        await self.loaded()
        if isinstance(request, types.UnloadModelRequest):
            return await self._unload(request)
        entry = await self._admission.entry(request)
        return await self._append(entry, in_order=in_order, patient=patient)

    async def create_custom_loss(
        self, request: types.CreateCustomLossRequest
    ) -> types.UntypedAPIFuture:
        """Store a custom loss of a session. A retry gets the same future.

        Raises:
            Rejected: the session is unknown or finished, or the sequence id is used.
        """
        scope = ids.loss_scope(request.session_id)
        if await self._ledger.operation_by_seq_id(scope, request.custom_loss_seq_id) is None:
            await self._admission.session_id(request.session_id)
        if self._stopping:
            raise Rejected(503, "The service is stopping; try again.")
        return future_of(await self._scheduler.custom_losses.create(request))

    async def refuse(
        self, kind: str, model_id: str, seq_id: int, message: str, *, in_order: bool = False
    ) -> types.UntypedAPIFuture:
        """Record a request with an unreadable body as a failed operation.

        It consumes its sequence id, so that later operations don't wait for it.

        Raises:
            Rejected: the run is unknown.
        """
        await self.loaded()
        entry = await self._admission.refused(kind, model_id, seq_id, message)
        return await self._append(entry, in_order=in_order)

    async def waits_for(self, request_id: str) -> str | None:
        """Return why an operation waits, or None while it executes or is queued."""
        scope = await self._scheduler.futures.scope(request_id)
        actor = self._scheduler.runs.find(scope) if scope is not None else None
        if actor is not None and actor.waits_for is not None:
            return actor.waits_for
        return None if self._context.workers.ready else "the service's worker loads its models"

    async def wait(self, request_id: str, seconds: float) -> Operation | None:
        """Wait for an operation to finish.

        Args:
            request_id: from `submit`.
            seconds: longest time to wait.

        Returns:
            The finished operation, or None if it is unfinished. It may lack a pass's `results`.

        Raises:
            UnknownFuture: no operation has this request id.
        """
        return await self._scheduler.futures.wait(request_id, seconds)

    async def follow(self, request_id: str, position: int = 0) -> AsyncIterator[SampleEvent]:
        """Stream a sample's tokens as they are drawn.

        The sample does not depend on its readers. Several may read it at a time, before and after
        its end, also after a restart of the service: a position always holds the same tokens.

        Args:
            request_id: from `submit`, of a sample.
            position: the first position to read.

        Returns:
            The tokens of each position in order, then the finished operation with its `failure`, or
            with its `result` for `decode_sample_response`. The stream ends without the operation
            when the service stops.

        Raises:
            UnknownFuture: no operation has this request id.
            Rejected: the operation is not a sample.
        """
        return await self.sampling.follow(request_id, position)

    # Acceptance

    async def _append(
        self, entry: Entry, *, in_order: bool, patient: bool = False
    ) -> types.UntypedAPIFuture:
        new = entry.operation
        try:
            if new.kind == ids.SAMPLE:
                async with self.sampling.admission(new, patient=patient):
                    return await self._accept(entry)
            actor = self._scheduler.runs.find(new.scope)
            position = actor.position if actor is not None else -1
            await check_not_far_ahead(self._ledger, new, position)
            if in_order and position < new.seq_id - 1:
                for skipped in await skip_gap(self._ledger, new):
                    self._scheduler.dispatch(skipped)
            return await self._accept(entry)
        except SessionFinished as error:
            raise Rejected(400, str(error)) from error

    async def _accept(self, entry: Entry) -> types.UntypedAPIFuture:
        new = entry.operation
        if self._stopping:
            raise Rejected(503, "The service is stopping; try again.")
        _VALIDATED()
        try:
            operation, is_new = await self._ledger.accept(
                new,
                run=entry.run,
                replace_failed=new.seq_id == 0 and new.kind != ids.SAMPLE,
                match_payload=entry.match_payload,
                open_session=True,
                max_queued=None if new.kind == ids.SAMPLE else self.settings.queue_bytes,
            )
        except SequenceConflict as error:
            operation, is_new = await self._missing_row(new, error), False
        if is_new:
            self._scheduler.futures.begin(operation)  # before anything else can end it
        _ACCEPTED()
        if entry.executes:
            self._scheduler.dispatch(operation)
        if entry.rejected is not None:
            raise entry.rejected
        return future_of(operation)

    async def _missing_row(self, new: NewOperation, conflict: SequenceConflict) -> Operation:
        """Return the failed operation that took the sequence id of one that arrives too late."""
        known = await self._ledger.operation_by_seq_id(new.scope, new.seq_id)
        if known is None or known.kind != ids.MISSING:
            raise Rejected(400, str(conflict)) from conflict
        return known

    async def _unload(self, request: types.UnloadModelRequest) -> types.UntypedAPIFuture:
        """Evict a run. It comes back with its next operation."""
        run = await self._admission.run(request.model_id)
        await self._scheduler.runs.unload(run.run_id)
        entry = self._admission.unload(
            run, await self._ledger.operations(ids.unload_scope(run.run_id))
        )
        operation, _ = await self._ledger.accept(entry)
        result = json.dumps({"model_id": run.run_id, "type": "unload_model"}).encode()
        operation = await self._ledger.succeed(operation.request_id, result, "json")
        return future_of(operation)
