"""Messages: the commands of the service to a worker, and the worker's replies and events.

Every command is a frozen dataclass that names its reply: ``Command[R]``. Every command but `Watch`
and `Cancel` ends in exactly one reply, an ``R`` or a `Failed`. Events come before it.

================= ======================================================= =======================
command           effect                                                  reply
================= ======================================================= =======================
`CreateRun`       create a run from its seed                              `RunCreated`
`RestoreRun`      create a run from a checkpoint or snapshot              `RunRestored`
`LoadCheckpoint`  load a checkpoint into a live run                       `CheckpointLoaded`
`TrainingPass`    forward or forward_backward of one training pass        `PassDone`
`OptimStep`       one optimizer step                                      `OptimStepDone`
`SaveRun`         capture the state now, write it in the background       `Captured`, `RunSaved`
`DropRun`         drop a run from memory                                  `RunDropped`
`Sample`          sequences and logprobs                                  `SampleDone`
`Watch`           send the tokens of a sample as they are drawn           `Drawn`, repeatedly
`Cancel`          stop a sample                                           none
`Encode`          tokenize a text or a conversation                       `Encoded`
`ImportAdapter`   write an adapter from outside as a checkpoint           `AdapterImported`
================= ======================================================= =======================

`Ready` and `Unusable` belong to no call. A worker sends one of them first, with call id 0.

The field called ``body`` holds arrays and requests in their encoded form. Values of the type `Any`
are JSON. `everstep.worker.protocol.codec` encodes messages for the socket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from everstep.engine.models.info import ModelInfo
from everstep.spool import Data
from everstep.vault import CheckpointId
from everstep.wire.messages.streams import DrawnTokens
from everstep.worker.protocol.lineage import Line
from everstep.worker.protocol.stored_request import StoredRequest

R = TypeVar("R", bound="Reply")


class Message:
    """Base of everything that goes over the socket."""


# Replies and events


@dataclass(frozen=True)
class Ready(Message):
    """Event: the models are loaded, at least one of them.

    Attributes:
        models: the models, under the names that they are served by.
        environment: the worker's numeric environment.
        refused: for each model that can't be served, the reason.
        state_bytes: what the states of runs may take of its device's memory. None: they lie in the
            memory of the host.
    """

    models: Sequence[ModelInfo]
    environment: Mapping[str, Any]
    refused: Mapping[str, str] = field(default_factory=dict)
    state_bytes: int | None = None


@dataclass(frozen=True)
class Unusable(Message):
    """Event: the worker can't serve, and ends.

    Attributes:
        reason: why none of the models, or the vault, could be opened.
    """

    reason: str


@dataclass(frozen=True)
class Captured(Message):
    """Event: the state that a `SaveRun` saves is captured. The run may go on."""


@dataclass(frozen=True)
class Drawn(Message):
    """Event: tokens of a watched sample, by position."""

    drawn: Sequence[DrawnTokens]


@dataclass(frozen=True)
class Failed(Message):
    """The call failed.

    Attributes:
        message: the text for the client.
        category: ``user`` or ``server``.
        unreachable: whether the vault's storage did not answer. A retry may succeed.
        unreadable: whether a stored request could not be read. Nothing was executed. If it was a
            run's, the worker has dropped the run, so that no later command is executed without it.
        out_of_memory: whether there was not enough memory, of the host or of the device. Nothing
            has changed, so a retry may succeed where other runs take less.
    """

    message: str
    category: str
    unreachable: bool = False
    unreadable: bool = False
    out_of_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply(Message):
    """Base of the replies of calls that succeeded.

    Attributes:
        seconds: computing time of a run's command. 0.0 where it isn't measured.
    """

    seconds: float = 0.0


@dataclass(frozen=True)
class RunCreated(Reply):
    """Reply to `CreateRun`.

    Attributes:
        bytes: memory that the run's state takes.
        numerics: the run's part of the numeric environment.
    """

    bytes: int
    numerics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRestored(Reply):
    """Reply to `RestoreRun`.

    Attributes:
        bytes: memory that the run's state takes.
        step: optimizer steps that the state has seen.
        parents: paths that the checkpoint descends from.
        numerics: the run's part of the numeric environment.
    """

    bytes: int
    step: int
    parents: Sequence[str]
    numerics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointLoaded(Reply):
    """Reply to `LoadCheckpoint`. The fields are those of `RunRestored`."""

    step: int
    parents: Sequence[str]
    numerics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassDone(Reply):
    """Reply to `TrainingPass`. ``body`` is the output in the protobuf form of the wire.

    On the service's side a large one is in a spool, which whoever takes it closes.
    """

    body: Data = field(repr=False)


@dataclass(frozen=True)
class OptimStepDone(Reply):
    """Reply to `OptimStep`."""

    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunSaved(Reply):
    """Reply to `SaveRun`: the checkpoint is durable.

    Attributes:
        size_bytes: size of all its files.
        step: optimizer steps that the state has seen.
    """

    size_bytes: int
    step: int


@dataclass(frozen=True)
class RunDropped(Reply):
    """Reply to `DropRun`."""


@dataclass(frozen=True)
class SampleDone(Reply):
    """Reply to `Sample`. ``body`` is the response in the protobuf form of the wire.

    On the service's side a large one is in a spool, as of `PassDone`.
    """

    body: Data = field(repr=False)


@dataclass(frozen=True)
class Encoded(Reply):
    """Reply to `Encode`."""

    tokens: Sequence[int]


@dataclass(frozen=True)
class AdapterImported(Reply):
    """Reply to `ImportAdapter`: the checkpoint is durable.

    Attributes:
        size_bytes: size of all its files.
        step: optimizer steps that the adapter has seen.
        lora: its LoRA configuration.
    """

    size_bytes: int
    step: int
    lora: Mapping[str, Any]


# Commands


@dataclass(frozen=True)
class Command(Message, Generic[R]):
    """Base of all commands. ``R`` is the reply."""


@dataclass(frozen=True)
class RunCommand(Command[R]):
    """Base of a run's commands. The worker executes those of one run in the order they come."""

    run: str


@dataclass(frozen=True)
class CreateRun(RunCommand[RunCreated]):
    """Create a run.

    Attributes:
        model: the base model.
        adapter: the LoRA configuration with its seed.
        environment: the numeric environment that the run was created in, whose choices it keeps.
            Empty: it is new.
    """

    model: str
    adapter: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RestoreRun(RunCommand[RunRestored]):
    """Create a run from a checkpoint or snapshot.

    Attributes:
        model: the base model.
        adapter: the LoRA configuration.
        source: the checkpoint or snapshot.
        optimizer: whether its optimizer state is restored as well, and the choices of arithmetic
            that go with it.
        environment: as for `CreateRun`, for weights without their optimizer.
    """

    model: str
    adapter: Mapping[str, Any]
    source: CheckpointId
    optimizer: bool
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadCheckpoint(RunCommand[CheckpointLoaded]):
    """Load a checkpoint into a live run. ``optimizer`` as for `RestoreRun`."""

    source: CheckpointId
    optimizer: bool


@dataclass(frozen=True)
class TrainingPass(RunCommand[PassDone]):
    """Forward or forward_backward.

    Attributes:
        body: the pass in the protobuf form of the wire, unless it is stored.
        may_diverge: whether it is computed with weights that are NaN or infinite.
        stored: where the service keeps it.
    """

    body: bytes = field(repr=False)
    may_diverge: bool = False
    stored: StoredRequest | None = None


@dataclass(frozen=True)
class OptimStep(RunCommand[OptimStepDone]):
    """One optimizer step.

    Attributes:
        params: those of `AdamParams`.
        may_diverge: whether it is made even if weights or moments become NaN or infinite.
    """

    params: Mapping[str, Any]
    may_diverge: bool = False


@dataclass(frozen=True)
class DropRun(RunCommand[RunDropped]):
    """Drop a run from memory. Dropping an unknown run is no error."""


@dataclass(frozen=True)
class SaveRun(RunCommand[RunSaved]):
    """Save a run's state.

    Attributes:
        manifest: the manifest's fields that the service knows.
        line: the lineage of the state.
        recipients: age recipients that the files are encrypted for. None: not encrypted.
        may_diverge: whether weights that are NaN or infinite are saved.
    """

    manifest: Mapping[str, Any]
    line: Line
    recipients: Sequence[str] = ()
    may_diverge: bool = False


@dataclass(frozen=True)
class Sample(Command[SampleDone]):
    """A sample.

    Attributes:
        model: the base model.
        source: the checkpoint whose adapter is sampled from. None: the base model's own weights.
        sampler: the sampler's id: prompts are cached per sampler.
        default_seed: the seed of a request that names none.
        body: the request, as JSON, unless it is stored.
        stored: where the service keeps it.
    """

    model: str
    source: CheckpointId | None
    sampler: str
    default_seed: int
    body: bytes = field(repr=False)
    stored: StoredRequest | None = None


@dataclass(frozen=True)
class Watch(Command[Reply]):
    """Send the tokens of the sample with this call's id, from a position on. Has no reply."""

    position: int


@dataclass(frozen=True)
class Cancel(Command[Reply]):
    """Stop the sample with this call's id. One that has ended is no error. Has no reply."""


@dataclass(frozen=True)
class Encode(Command[Encoded]):
    """Tokenize a prompt as `everstep.worker.chat_template.prompt_tokens` reads it."""

    model: str
    prompt: Mapping[str, Any]


@dataclass(frozen=True)
class ImportAdapter(Command[AdapterImported]):
    """Write an adapter from outside as a checkpoint.

    Attributes:
        model: the base model.
        directory: the directory with the adapter's files.
        step: optimizer steps that it has seen.
        seed: the seed that it was initialised with.
        lora: the LoRA configuration that it must have. None: any.
        manifest: the manifest's fields that the service knows.
    """

    model: str
    directory: str
    step: int
    seed: int
    lora: Mapping[str, Any] | None
    manifest: Mapping[str, Any]
