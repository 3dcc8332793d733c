"""resume_or_create: go on with a named run from its newest checkpoint that loads, or begin it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from everstep.client import _catalogue
from everstep.client._catalogue import SavedCheckpoint
from everstep.client._errors import (
    APIStatusError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    RequestFailedError,
    UnprocessableEntityError,
)
from everstep.client._futures import APIFuture
from everstep.client.loop_errors import CheckpointsUnusable, RunLost
from everstep.client.loop_events import Kind, LoopEvent, OnEvent, tell_event
from everstep.client.loop_state import RUN, LoopState
from everstep.client.run_monitor import why_session_lost
from everstep.client.service_client import ServiceClient
from everstep.client.training_client import TrainingClient
from everstep.wire import types
from everstep.wire.errors import ErrorCategory

_OF_THE_CHECKPOINT = (
    RequestFailedError,
    NotFoundError,
    BadRequestError,
    ConflictError,
    UnprocessableEntityError,
)
"""What a service answers when a checkpoint can't be loaded; anything else is about the service."""


@dataclass(frozen=True)
class RunSpec:
    """What a named run is created with; see `ServiceClient.create_lora_training_client`."""

    base_model: str
    rank: int = 32
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    user_metadata: Mapping[str, str] | None = None
    optimizer: types.OptimizerConfigBase | None = None

    def differences(self, info: types.WeightsInfoResponse) -> list[str]:
        """The fields in which a checkpoint is of another geometry, as far as it is told."""
        told: dict[str, tuple[object, object]] = {
            "base_model": (self.base_model, info.base_model),
            "rank": (self.rank, info.lora_rank),
            "train_mlp": (self.train_mlp, info.train_mlp),
            "train_attn": (self.train_attn, info.train_attn),
            "train_unembed": (self.train_unembed, info.train_unembed),
        }
        if self.optimizer is not None:
            told["optimizer"] = (self.optimizer.type, info.optimizer_config.type)
        return [
            f"{name} is {theirs!r} there and {own!r} here"
            for name, (own, theirs) in told.items()
            if theirs is not None and own != theirs
        ]


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was tried and doesn't load, or whose loop state is damaged."""

    path: str
    reason: str


@dataclass(frozen=True)
class ResumeReport:
    """How a run was resumed or begun.

    Attributes:
        run_name: the run.
        spec: what it is created with.
        path: the checkpoint it goes on from; None: it is new.
        skipped: newer checkpoints that don't load. A `Checkpointer` of this run leaves them alone.
        complete: whether the whole loop state was there; without: ``user`` is empty, because the
            service drops ``user_metadata``.
        generation: of the checkpoints that will be saved.
        serial: of the next one.
        known: the run's checkpoints as they were found, oldest first.
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
        """Whether the run goes on from a checkpoint."""
        return self.path is not None


class Resumed(NamedTuple):
    """A training client, where its loop goes on, and how that was found."""

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
    """Go on with a named run from its newest checkpoint that loads; create it when it has none.

    Weights, optimizer state and pending gradients are restored exactly, with the loop's state.
    The checkpoints are those that a `Checkpointer` saved under this name with this account.

    Args:
        service: where the run is.
        run_name: up to 40 letters, digits, ``_`` and ``-``.
        base_model: of the run; as for `ServiceClient.create_lora_training_client`.
        rank: of the adapter.
        seed: of its initialisation.
        train_mlp: adapt the MLPs.
        train_attn: adapt the attention.
        train_unembed: adapt the output head.
        user_metadata: kept with the run.
        optimizer: its family.
        on_event: told of what is skipped, and of what the run goes on from.

    Returns:
        ``client, state, report``. The report says which newer checkpoints were skipped, and why.

    Raises:
        ValueError: the name breaks the rule, or the run has another base model, rank, ….
        CheckpointsUnusable: it has checkpoints, and none loads; nothing is begun anew, since that
            would bury them. Begin under another name if that is what you want.
        RunLost: the service no longer has this client's session; no checkpoint is to blame.

    Example:
        >>> client, state, report = resume_or_create(service, "sft", "everstep/pico").result()
    """
    _catalogue.check_run_name(run_name)
    spec = RunSpec(
        base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
    )

    async def work() -> Resumed:
        known = await _catalogue.find(service.create_rest_client(), run_name)
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
    """Create a client from the first candidate that loads, or a new run when there are none.

    Raises:
        ValueError: a candidate is of another geometry than the run.
        CheckpointsUnusable: none of the candidates loads.
        RunLost: the session is gone.
    """
    metadata = {**(spec.user_metadata or {}), RUN: run_name}
    skipped: list[Skipped] = []
    generation = max((each.place.generation for each in known), default=-1) + 1
    serial = max((each.place.serial for each in known), default=-1) + 1

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
        tell_event(on_event, LoopEvent(kind, run_name, report.path, state.step, detail))
        return Resumed(client, state, report)

    for candidate in candidates:
        reason = candidate.damage
        if reason is None:
            try:
                return resumed(await _load(service, candidate, spec, metadata), candidate)
            except _OF_THE_CHECKPOINT as error:
                reason = str(error)
        skipped.append(Skipped(candidate.path, reason))
        event = LoopEvent("skipped", run_name, candidate.path, candidate.state.step, reason)
        tell_event(on_event, event)
    if skipped:
        told = "\n".join(f"  {each.path}: {each.reason}" for each in skipped)
        raise CheckpointsUnusable(
            f"Run {run_name!r} has checkpoints, and none of them can be loaded:\n{told}\n"
            "Repair or delete them, or begin under another run name."
        )
    return resumed(await _create(service, spec, metadata), None)


async def load(
    service: ServiceClient, path: str, metadata: Mapping[str, str] | None = None
) -> TrainingClient:
    """A client from a checkpoint; a failure that is the service's own is tried once more.

    A service that was started again meanwhile may not know the request any more (404).

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
        if (lost := await why_session_lost(service.holder)) is not None:
            raise RunLost(lost) from error
        if not isinstance(error, NotFoundError):
            raise
    return await create(path, user_metadata=metadata)


async def _load(
    service: ServiceClient, candidate: SavedCheckpoint, spec: RunSpec, metadata: dict[str, str]
) -> TrainingClient:
    """A client from a checkpoint of the run's geometry."""
    info = await service.create_rest_client().get_weights_info_by_tinker_path(candidate.path)
    if differences := spec.differences(info):
        raise ValueError(
            f"{candidate.path} is of another run than asked for: {'; '.join(differences)}"
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
