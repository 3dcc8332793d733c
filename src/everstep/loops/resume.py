"""resume_or_create: continue a named run from its newest checkpoint that loads, or create it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from everstep.client._transport.errors import (
    APIStatusError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    RequestFailedError,
    UnprocessableEntityError,
)
from everstep.client._transport.futures import APIFuture
from everstep.client.service_client import ServiceClient
from everstep.client.training_client import TrainingClient
from everstep.loops import catalog
from everstep.loops.catalog import SavedCheckpoint
from everstep.loops.errors import CheckpointsUnusable, RunLost
from everstep.loops.events import Kind, LoopEvent, OnEvent, emit
from everstep.loops.run_monitor import session_loss_reason
from everstep.loops.state import RUN, LoopState
from everstep.wire import types
from everstep.wire.errors import ErrorCategory

_CHECKPOINT_ERRORS = (
    RequestFailedError,
    NotFoundError,
    BadRequestError,
    ConflictError,
    UnprocessableEntityError,
)
"""Responses that mean that a checkpoint can't be loaded. Any other is about the service."""


@dataclass(frozen=True)
class RunSpec:
    """Settings of a named run. See `ServiceClient.create_lora_training_client`."""

    base_model: str
    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    user_metadata: Mapping[str, str] | None = None
    optimizer: types.OptimizerConfigBase | None = None

    def differences(self, info: types.WeightsInfoResponse) -> list[str]:
        """List the fields in which a checkpoint's settings differ, if the service sends them."""
        compared: dict[str, tuple[object, object]] = {
            "base_model": (self.base_model, info.base_model),
            "rank": (self.rank, info.lora_rank),
            "train_mlp": (self.train_mlp, info.train_mlp),
            "train_attn": (self.train_attn, info.train_attn),
            "train_unembed": (self.train_unembed, info.train_unembed),
        }
        if self.optimizer is not None:
            compared["optimizer"] = (self.optimizer.type, info.optimizer_config.type)
        return [
            f"{name} is {theirs!r} there and {own!r} here"
            for name, (own, theirs) in compared.items()
            if theirs is not None and own != theirs
        ]


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was tried but doesn't load, or whose loop state is damaged."""

    path: str
    reason: str


@dataclass(frozen=True)
class ResumeReport:
    """How a run was resumed or created.

    Attributes:
        run_name: the run.
        spec: its settings.
        path: the checkpoint that it continues from. None: it is new.
        skipped: newer checkpoints that don't load. A `Checkpointer` of this run doesn't delete
            them.
        complete: whether the whole loop state was restored. If not, ``user`` is empty, because the
            service drops ``user_metadata``.
        generation: of the checkpoints that will be saved.
        serial: of the next checkpoint.
        known: the run's existing checkpoints, oldest first.
    """

    run_name: str
    spec: RunSpec
    path: str | None
    skipped: tuple[Skipped, ...]
    complete: bool
    generation: int
    serial: int
    known: tuple[SavedCheckpoint, ...]

    @property
    def resumed(self) -> bool:
        """Whether the run continues from a checkpoint."""
        return self.path is not None


class Resumed(NamedTuple):
    """A training client, the state to continue from, and a report."""

    client: TrainingClient
    state: LoopState
    report: ResumeReport


def resume_or_create(
    service: ServiceClient,
    run_name: str,
    base_model: str,
    rank: int = 32,
    seed: int | None = None,
    train_mlp: bool = True,
    train_attn: bool = True,
    train_unembed: bool = True,
    user_metadata: Mapping[str, str] | None = None,
    optimizer: types.OptimizerConfigBase | None = None,
    *,
    on_event: OnEvent | None = None,
) -> APIFuture[Resumed]:
    """Continue a named run from its newest checkpoint that loads, or create it if it has none.

    Weights, optimizer state, pending gradients and the loop's state are restored exactly. The
    checkpoints are those that a `Checkpointer` saved under this name with this account.

    Args:
        service: the service to train on.
        run_name: up to 40 letters, digits, ``_`` and ``-``.
        base_model: of the run, as for `ServiceClient.create_lora_training_client`.
        rank: of the adapter.
        seed: of the adapter's initialisation.
        train_mlp: adapt the MLPs.
        train_attn: adapt the attention.
        train_unembed: adapt the output head.
        user_metadata: stored with the run.
        optimizer: optimizer family.
        on_event: called for skipped checkpoints, and for the one that the run continues from.

    Returns:
        ``client, state, report``. The report lists the newer checkpoints that were skipped.

    Raises:
        ValueError: the name is invalid, or the run has another base model, rank, ….
        CheckpointsUnusable: the run has checkpoints, but none loads. No new run is created, because
            that would bury them. Use another name to start over.
        RunLost: the service no longer has this client's session. No checkpoint is at fault.

    Example:
        >>> client, state, report = resume_or_create(service, "sft", "everstep/pico").result()
    """
    catalog.check_run_name(run_name)
    spec = RunSpec(
        base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
    )

    async def work() -> Resumed:
        known = await catalog.find(service.create_rest_client(), run_name)
        return await restore(service, run_name, spec, known, known[::-1], on_event)

    return APIFuture.of(work())


async def restore(
    service: ServiceClient,
    run_name: str,
    spec: RunSpec,
    known: Sequence[SavedCheckpoint],
    candidates: Sequence[SavedCheckpoint],
    on_event: OnEvent | None,
) -> Resumed:
    """Create a client from the first candidate that loads, or a new run if there are no candidates.

    Raises:
        ValueError: a candidate's settings differ from the run's.
        CheckpointsUnusable: none of the candidates loads.
        RunLost: the session is gone.
    """
    metadata = {**(spec.user_metadata or {}), RUN: run_name}
    skipped: list[Skipped] = []
    generation = max((each.save_id.generation for each in known), default=-1) + 1
    serial = max((each.save_id.serial for each in known), default=-1) + 1

    def resumed(client: TrainingClient, origin: SavedCheckpoint | None) -> Resumed:
        state = LoopState() if origin is None else origin.state
        report = ResumeReport(
            run_name=run_name,
            spec=spec,
            path=None if origin is None else origin.path,
            skipped=tuple(skipped),
            complete=origin is None or origin.complete,
            generation=generation,
            serial=serial,
            known=tuple(known),
        )
        kind: Kind = "created" if origin is None else "resumed"
        detail = None if report.complete else "the service dropped the loop state's user dictionary"
        emit(on_event, LoopEvent(kind, run_name, report.path, state.step, detail))
        return Resumed(client, state, report)

    for candidate in candidates:
        reason = candidate.damage
        if reason is None:
            try:
                return resumed(await _load(service, candidate, spec, metadata), candidate)
            except _CHECKPOINT_ERRORS as error:
                reason = str(error)
        skipped.append(Skipped(candidate.path, reason))
        event = LoopEvent("skipped", run_name, candidate.path, candidate.state.step, reason)
        emit(on_event, event)
    if skipped:
        reasons = "\n".join(f"  {each.path}: {each.reason}" for each in skipped)
        raise CheckpointsUnusable(
            f"Run {run_name!r} has checkpoints, and none of them can be loaded:\n{reasons}\n"
            "Repair or delete them, or start under another run name."
        )
    return resumed(await _create(service, spec, metadata), None)


async def load(
    service: ServiceClient, path: str, metadata: Mapping[str, str] | None = None
) -> TrainingClient:
    """Create a client from a checkpoint. A failure of the service is retried once.

    A service that was restarted in the meantime may not know the request any more (404).

    Raises:
        RunLost: the session is gone.
    """
    create = service.create_training_client_from_state_with_optimizer
    try:
        return await create(path, user_metadata=metadata)
    except RequestFailedError as error:
        if error.category == ErrorCategory.USER:
            raise
    except APIStatusError as error:
        if (lost := await session_loss_reason(service.holder)) is not None:
            raise RunLost(lost) from error
        if not isinstance(error, NotFoundError):
            raise
    return await create(path, user_metadata=metadata)


async def _load(
    service: ServiceClient, candidate: SavedCheckpoint, spec: RunSpec, metadata: dict[str, str]
) -> TrainingClient:
    """Create a client from a checkpoint with the run's settings."""
    info = await service.create_rest_client().get_weights_info_by_tinker_path(candidate.path)
    if differences := spec.differences(info):
        raise ValueError(
            f"{candidate.path} does not match the requested run: {'; '.join(differences)}"
        )
    return await load(service, candidate.path, metadata)


async def _create(
    service: ServiceClient, spec: RunSpec, metadata: dict[str, str]
) -> TrainingClient:
    return await service.create_lora_training_client(
        spec.base_model,
        rank=spec.rank,
        seed=spec.seed,
        train_mlp=spec.train_mlp,
        train_attn=spec.train_attn,
        train_unembed=spec.train_unembed,
        user_metadata=metadata,
        optimizer=spec.optimizer,
    )
