"""The runtime: accepts requests durably, has them executed in order, hands results out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from everstep.engine.info import ModelInfo
from everstep.failpoints import Failpoint
from everstep.ledger import Ledger, NewOperation, Operation, SequenceConflict
from everstep.runtime import names
from everstep.runtime.accept import Acceptance, Entry, Request
from everstep.runtime.access import Access
from everstep.runtime.administration import Administration
from everstep.runtime.care import Care
from everstep.runtime.checkpoint_details import CheckpointDetails
from everstep.runtime.checkpoints import Checkpoints
from everstep.runtime.copies import Copies
from everstep.runtime.downloads import Downloads
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.followers import SampleEvent
from everstep.runtime.futures import future_of
from everstep.runtime.gaps import skip_gap
from everstep.runtime.housekeeping import Housekeeping
from everstep.runtime.imports import Imports
from everstep.runtime.lifetimes import Lifetimes
from everstep.runtime.links import Links
from everstep.runtime.scheduling import Scheduling
from everstep.runtime.session_views import SessionViews
from everstep.runtime.sessions import Sessions
from everstep.runtime.settings import Settings
from everstep.runtime.text_completions import TextCompletions
from everstep.runtime.tokenizers import tokenizer_files
from everstep.runtime.traces import Traces
from everstep.runtime.views import Views
from everstep.runtime.worker_process import WorkerProcess
from everstep.vault import Vault, open_vault
from everstep.vault.location import settle
from everstep.wire import types

_FARTHEST_AHEAD = 10_000
_VALIDATED = Failpoint("runtime.accept.validated", "a request is sound, and not in the ledger")
_ACCEPTED = Failpoint("runtime.accept.accepted", "a request is in the ledger, no one was told")


@dataclass
class Parts:
    """The rooms that a runtime brings together."""

    home: Path
    ledger: Ledger
    vault: Vault
    worker: WorkerProcess
    checkpoints: Checkpoints
    settings: Settings


class Runtime:
    """One service's runs, samplers and futures over one home directory.

    Attributes:
        sessions: opening, heartbeats and ends of sessions; creation of samplers.
        sampling: samples that are under way.
        completions: samples that have ended.
        views: what the service tells of models, runs and checkpoints.
        checkpoints: look-up and deletion of checkpoints.
        access: who may read which checkpoint.
        lifetimes: how long checkpoints stay, and whether they are public.
        copies: copies of checkpoints in other projects.
        downloads: addresses of checkpoints' files, and the files.
        imports: checkpoints that were made elsewhere.
        text_completions: what completes a text, by a model's name.
        session_views: what the service tells of sessions.
        traces: time lines of sessions.
        care: collecting and pruning on request.
        details: what one checkpoint is made of, and whether it is as it was written.
        administration: audit log and storage.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger = parts.ledger
        self.access = Access(parts.ledger)
        self.lifetimes = Lifetimes(parts.ledger, parts.vault, parts.checkpoints)
        self._acceptance = Acceptance(
            parts.ledger,
            parts.checkpoints,
            lambda: parts.worker.models,
            parts.settings,
            self.access,
        )
        self._housekeeping = Housekeeping(
            parts.ledger,
            parts.vault,
            parts.worker,
            parts.checkpoints,
            self.lifetimes,
            parts.settings,
        )
        self._scheduling = Scheduling(
            parts.ledger, parts.vault, parts.worker, parts.checkpoints, parts.settings
        )
        self.sampling = self._scheduling.sampling
        self.completions = self._scheduling.completions
        self._stopping = False
        self.checkpoints = parts.checkpoints
        self.sessions = Sessions(parts.ledger, parts.checkpoints, self._acceptance, self.access)
        self.views = Views(
            parts.ledger,
            parts.checkpoints,
            self._acceptance,
            lambda: parts.worker.models,
            self.access,
        )
        self.text_completions = TextCompletions(
            parts.home, parts.ledger, parts.worker, self.sessions
        )
        self.session_views = SessionViews(parts.ledger)
        self.copies = Copies(parts.ledger, parts.vault, parts.checkpoints, self.access)
        self.imports = Imports(
            parts.home,
            parts.ledger,
            parts.vault,
            parts.worker,
            parts.checkpoints,
            parts.settings.import_bytes,
        )
        self.care = Care(parts.ledger, parts.vault, parts.worker, parts.checkpoints)
        self.details = CheckpointDetails(parts.vault, parts.checkpoints, self.access)
        self.administration = Administration(parts.ledger)
        links = Links(parts.home)
        self.traces = Traces(parts.home / "traces", parts.ledger, links)
        self.downloads = Downloads(parts.ledger, parts.vault, parts.checkpoints, self.access, links)

    @classmethod
    async def open(
        cls,
        home: Path,
        models: Mapping[str, str],
        settings: Settings,
        vault_url: str | None = None,
    ) -> Runtime:
        """Open a home directory, start the worker, and go on with what was unfinished.

        Returns at once: models are loaded and runs brought back while the service answers.

        Args:
            home: everything the service keeps; created when it isn't there.
            models: what is served: name → directory, hub id or ``everstep/pico``.
            settings: limits and intervals.
            vault_url: the bucket that its vault lies in; None: where it lay so far.

        Raises:
            LedgerLocked: another service has the home.
            VaultError: it can't have that vault.
            StoreFailed: the bucket does not answer, or can't hold a vault.
        """
        await asyncio.to_thread(home.mkdir, parents=True, exist_ok=True)
        ledger = await Ledger.open(home / "ledger.sqlite")
        try:
            await asyncio.to_thread(settle, home, vault_url)
            retry = settings.vault_retry_seconds
            vault = await asyncio.to_thread(open_vault, home, writer=False, retry_seconds=retry)
            worker = WorkerProcess(home, models, settings)
            checkpoints = Checkpoints(ledger, vault, settings)
            runtime = cls(Parts(home, ledger, vault, worker, checkpoints, settings))
            await checkpoints.follow_quarantine()
            await runtime.lifetimes.settle()
            await runtime._scheduling.go_on()
        except BaseException:
            await ledger.close()
            raise
        worker.start()
        runtime._housekeeping.start()
        return runtime

    async def started(self) -> None:
        """Wait until models are loaded; at once when they are.

        Raises:
            OperationFailed: a model can't be loaded; the service can't serve.
        """
        await self._parts.worker.started()

    async def loaded(self) -> None:
        """Wait until models are loaded; raises `Rejected` (503) where they can't be."""
        try:
            await self.started()
        except OperationFailed as failure:
            raise Rejected(503, failure.message) from failure

    @property
    def ready(self) -> bool:
        """Whether requests will succeed now."""
        return self._parts.worker.ready and not self._stopping

    @property
    def settings(self) -> Settings:
        """Limits and intervals."""
        return self._parts.settings

    @property
    def models(self) -> list[ModelInfo]:
        """The models that are served."""
        return list(self._parts.worker.models.values())

    async def tokenizer_files(self, model_name: str) -> dict[str, bytes]:
        """A served model's tokenizer, as files by name; raises `Rejected` (404) for another.

        Args:
            model_name: as it is served, or where its tokenizer comes from.
        """
        await self.loaded()
        for info in self._parts.worker.models.values():
            if model_name in (info.name, info.tokenizer_id):
                return await asyncio.to_thread(tokenizer_files, self._parts.home, info.name)
        raise Rejected(404, f"Model {model_name} is not served here.")

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker."""
        return self._parts.worker.pid

    async def close(self) -> None:
        """Finish what executes, snapshot the runs, end the worker; bounded by the settings."""
        self._stopping = True
        await self._housekeeping.close()
        await self.sampling.close()
        await self.traces.close()
        await self._scheduling.actors.close()
        await self._parts.worker.close()
        await self._ledger.close()

    async def submit(
        self,
        request: Request | types.UnloadModelRequest,
        *,
        in_order: bool = False,
        patient: bool = False,
    ) -> types.UntypedAPIFuture:
        """Accept a request durably and have it executed in its turn.

        Args:
            request: a typed request of the wire.
            in_order: the client sends a run's operations one after the other: what it left out
                before this one never comes.
            patient: a sample waits for a place, for a while, before it is refused.

        Returns:
            The future; a retry of the same request gets the same one.

        Raises:
            Rejected: the request can't be attributed, or reuses a sequence id for another one; or
                there is no place for a sample (429).
        """
        await self.loaded()
        if isinstance(request, types.UnloadModelRequest):
            return await self._unload(request)
        entry = await self._acceptance.entry(request)
        return await self._append(entry, in_order=in_order, patient=patient)

    async def create_custom_loss(
        self, request: types.CreateCustomLossRequest
    ) -> types.UntypedAPIFuture:
        """Keep a loss of a user's own for its session; a retry gets the same future.

        Raises:
            Rejected: there is no such session, it is finished, or the place is taken.
        """
        scope = names.loss_scope(request.session_id)
        if await self._ledger.operation_at(scope, request.custom_loss_seq_id) is None:
            await self._acceptance.session_id(request.session_id)
        if self._stopping:
            raise Rejected(503, "The service is stopping; try again.")
        return future_of(await self._scheduling.custom_losses.create(request))

    async def refuse(
        self, kind: str, model_id: str, seq_id: int, message: str, *, in_order: bool = False
    ) -> types.UntypedAPIFuture:
        """Accept, as failed, a request whose body can't be read but whose place is known.

        Raises:
            Rejected: there is no such run.
        """
        await self.loaded()
        entry = await self._acceptance.refused(kind, model_id, seq_id, message)
        return await self._append(entry, in_order=in_order)

    async def waits_for(self, request_id: str) -> str | None:
        """Why an operation is not executed at the moment; None where it is, or is queued."""
        operation = await self._ledger.operation(request_id)
        actor = self._scheduling.actors.find(operation.scope) if operation is not None else None
        if actor is not None and actor.waits_for is not None:
            return actor.waits_for
        return None if self._parts.worker.ready else "the service's worker loads its models"

    async def wait(self, request_id: str, seconds: float) -> Operation | None:
        """Wait for an operation to finish.

        Args:
            request_id: what `submit` returned.
            seconds: how long to wait at most.

        Returns:
            The finished operation; None when it is still unfinished.

        Raises:
            UnknownFuture: there is no such operation.
        """
        return await self._scheduling.futures.wait(request_id, seconds)

    async def follow(self, request_id: str, position: int = 0) -> AsyncIterator[SampleEvent]:
        """Read a sample along as it is drawn.

        The sample goes on whether it is read or not, and may be followed again, by several at a
        time, before and after its end, also of another process of the service: a position holds
        the same tokens whenever it is read.

        Args:
            request_id: what `submit` returned for a sample.
            position: the first position that is wanted.

        Returns:
            What was drawn at each position in order, and last the finished operation: its
            `failure`, or its `result` for `decode_sample_response`. It ends without one when the
            service stops.

        Raises:
            UnknownFuture: there is no such operation.
            Rejected: it is no sample.
        """
        return await self.sampling.follow(request_id, position)

    # Acceptance

    async def _append(
        self, entry: Entry, *, in_order: bool, patient: bool = False
    ) -> types.UntypedAPIFuture:
        new = entry.operation
        if new.kind != names.SAMPLE:
            await self._check_not_far_ahead(new.scope, new.seq_id)
        for skipped in await skip_gap(self._ledger, new) if in_order else ():
            self._scheduling.schedule(skipped)
        if new.kind != names.SAMPLE:
            return await self._accept(entry)
        async with self.sampling.admission(new, patient=patient):
            return await self._accept(entry)

    async def _accept(self, entry: Entry) -> types.UntypedAPIFuture:
        new = entry.operation
        if self._stopping:
            raise Rejected(503, "The service is stopping; try again.")
        _VALIDATED()
        try:
            operation, _ = await self._ledger.accept(
                new,
                run=entry.run,
                replace_failed=new.seq_id == 0 and new.kind != names.SAMPLE,
                match_payload=entry.match_payload,
            )
        except SequenceConflict as error:
            operation = await self._gave_up(new, error)
        _ACCEPTED()
        if entry.executes:
            self._scheduling.schedule(operation)
        if entry.rejected is not None:
            raise entry.rejected
        return future_of(operation)

    async def _gave_up(self, new: NewOperation, conflict: SequenceConflict) -> Operation:
        """What was put into the place of an operation that comes too late; it says so."""
        known = await self._ledger.operation_at(new.scope, new.seq_id)
        if known is None or known.kind != names.MISSING:
            raise Rejected(400, str(conflict)) from conflict
        return known

    async def _check_not_far_ahead(self, scope: str, seq_id: int) -> None:
        """Raise `Rejected` (400) for a place that no client can have come to by counting."""
        actor = self._scheduling.actors.find(
            scope
        )  # it counts from the start again while it is brought back
        after = seq_id - _FARTHEST_AHEAD - 1
        if after < 0 or (actor is not None and after < actor.position):
            return
        if not await self._ledger.operations(scope, after=after, limit=1):
            raise Rejected(
                400,
                f"seq_id {seq_id} is too far ahead: none of the {_FARTHEST_AHEAD} before it came; "
                "sequence ids count up by one.",
            )

    async def _unload(self, request: types.UnloadModelRequest) -> types.UntypedAPIFuture:
        """Let a run leave memory. It keeps everything, and comes back with its next request."""
        run = await self._acceptance.run(request.model_id)
        actor = self._scheduling.actors.find(run.run_id)
        if actor is not None:
            await actor.unload()
        entry = self._acceptance.unload(
            run, await self._ledger.operations(names.unload_scope(run.run_id))
        )
        operation, _ = await self._ledger.accept(entry)
        result = json.dumps({"model_id": run.run_id, "type": "unload_model"}).encode()
        operation = await self._ledger.succeed(operation.request_id, result, "json")
        return future_of(operation)
