"""Commands: executes the service's commands on the worker's models and runs.

`everstep.worker.protocol.messages` lists the commands and their replies. A run's commands are
generators that yield between their steps. The round-robin advances them. Checkpoints are written
by a thread of their own, in the order in which they were captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from everstep.background_io import lower_priority
from everstep.engine import (
    AdamParams,
    AdapterConfig,
    Capture,
    Model,
    RunState,
    forward_backward,
    optim_step,
)
from everstep.engine.environment import environment
from everstep.engine.errors import InputError
from everstep.engine.numerics import Numerics
from everstep.failpoints import Failpoint
from everstep.logs import get_logger
from everstep.vault import FileRef, Manifest, StoreFailed, Vault, VaultError
from everstep.wire.codecs.proto import decode_training_pass, encode_forward_backward_output
from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.streams import DrawnTokens
from everstep.worker.chat_template import prompt_tokens
from everstep.worker.checkpoint_io import (
    ADAPTER_FILE,
    Loaded,
    read_checkpoint,
    write_checkpoint,
)
from everstep.worker.import_adapter import write_import
from everstep.worker.protocol import messages
from everstep.worker.protocol.channel import BlockingChannel, Envelope
from everstep.worker.protocol.errors import RequestUnreadable
from everstep.worker.protocol.heartbeat import SAMPLING, HeartbeatPage
from everstep.worker.protocol.lineage import parent_of, standing
from everstep.worker.protocol.stored_request import read_request
from everstep.worker.round_robin import RoundRobin
from everstep.worker.samplers import Samplers

_log = get_logger("everstep.worker")
_BEGUN = Failpoint("worker.command.begun", "a command is about to be executed")
_STEP_BEGUN = Failpoint("worker.optim_step.begun", "an optimizer step is about to be made")
_DONE = Failpoint("worker.command.done", "a command is executed, its reply is not sent")
_CAPTURED = Failpoint("worker.save.captured", "a state is captured, nothing of it is written")
_SAMPLED = Failpoint("worker.sample.step", "a decode step is about to be made")
_SPARE_SECONDS = 0.01
"""How long a step that waits for spare memory holds up others before each of their steps."""
_WITH_OPTIMIZER = ("training", "snapshot")
_Steps = Generator[None, None, messages.Reply]
CheckpointWriter = Callable[..., dict[str, Any]]
"""`write_checkpoint`, or a test's stand-in that delays it or fails."""


class Commands:
    """The worker's state, and its commands.

    Args:
        models: the base models by name.
        vault: where checkpoints are.
        home: where stored requests are.
        channel: where replies go.
        tasks: where the steps of commands are queued.
        page: where the call is recorded whose files are being written.
        prefix_bytes: bound on the memory of the prompts' key-value cache.
        write: writes a captured state.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        vault: Vault,
        home: Path,
        channel: BlockingChannel,
        tasks: RoundRobin,
        page: HeartbeatPage,
        prefix_bytes: int,
        write: CheckpointWriter = write_checkpoint,
    ) -> None:
        self._models = models
        self._vault = vault
        self._home = home
        self._channel = channel
        self._tasks = tasks
        self._page = page
        self._write_checkpoint = write
        self._environment = environment()  # takes 2 ms, which each save would wait for
        self._runs: dict[str, tuple[Model, RunState]] = {}
        self._samplers = Samplers(
            models, vault, home, self._channel.send, self._fail, self._send_drawn, prefix_bytes
        )
        self._sampling: set[str] = set()
        self._loaded: dict[str, Loaded] = {}  # of runs that have not changed since
        self._unwritten: set[str] = set()
        self._writer = ThreadPoolExecutor(1, "checkpoint writer", initializer=lower_priority)
        self._handlers: dict[type[messages.Message], Callable[[int, Any], None]] = {
            messages.CreateRun: partial(self._queue, self._create),
            messages.RestoreRun: partial(self._queue, self._restore),
            messages.LoadCheckpoint: partial(self._queue, self._load),
            messages.TrainingPass: partial(self._queue, self._pass),
            messages.OptimStep: partial(self._queue, self._optim_step),
            messages.DropRun: partial(self._queue, self._drop),
            messages.SaveRun: self._queue_save,
            messages.Sample: self._sample,
            messages.Watch: self._watch,
            messages.Cancel: self._cancel,
            messages.Encode: self._encode,
            messages.ImportAdapter: self._import,
        }

    def handle(self, envelope: Envelope) -> None:
        """Execute a command, or queue its steps behind the others of its run."""
        self._handlers[type(envelope.message)](envelope.call_id, envelope.message)

    def _queue(
        self,
        begin: Callable[[Any], _Steps],
        call_id: int,
        command: messages.RunCommand[messages.Reply],
    ) -> None:
        self._tasks.add(command.run, call_id, self._answered(call_id, begin(command)))

    def _answered(self, call_id: int, steps: _Steps) -> Generator[None, None, None]:
        """Run a command's steps and send the reply."""
        seconds = 0.0
        _BEGUN()
        while True:
            begin = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                seconds += time.perf_counter() - begin
                _DONE()
                self._channel.send(call_id, replace(end.value, seconds=seconds))
                return
            except Exception as error:  # noqa: BLE001  one operation's failure is reported, not ours
                self._fail(call_id, error)
                return
            seconds += time.perf_counter() - begin
            yield

    def _send_drawn(self, call_id: int, drawn: Sequence[DrawnTokens]) -> None:
        self._channel.send(call_id, messages.Drawn(drawn))

    def _fail(self, call_id: int, error: BaseException) -> None:
        by_user = isinstance(error, InputError)
        if not by_user:
            _log.error("operation failed", error=repr(error), exc_info=error)
        for_client = by_user or isinstance(error, VaultError | StoreFailed)
        text = str(error) if for_client else repr(error)
        out_of_memory = _out_of_memory(error)
        if out_of_memory:
            text = f"There was not enough memory for this operation; make it smaller. {text}"
        category = ErrorCategory.USER if by_user else ErrorCategory.SERVER
        unreachable = isinstance(error, StoreFailed)
        unreadable = isinstance(error, RequestUnreadable)
        failed = messages.Failed(text, str(category), unreachable, unreadable, out_of_memory)
        self._channel.send(call_id, failed)

    # Commands of a run: generators that yield between their steps.

    def _create(self, command: messages.CreateRun) -> _Steps:
        yield from ()
        model = self._models[command.model]
        numerics = Numerics.recorded(command.environment)
        state = model.new_run(AdapterConfig(**command.adapter), numerics=numerics)
        self._runs[command.run] = (model, state)
        self._loaded.pop(command.run, None)
        return messages.RunCreated(state.nbytes, _recorded(state))

    def _restore(self, command: messages.RestoreRun) -> _Steps:
        yield from ()
        model = self._models[command.model]
        config = AdapterConfig(**command.adapter)
        state, manifest = self._read(model, config, None, command)
        found = _recorded(state)
        return messages.RunRestored(state.nbytes, state.step, manifest.parents, found)

    def _load(self, command: messages.LoadCheckpoint) -> _Steps:
        yield from ()
        model, state = self._runs[command.run]
        state, manifest = self._read(model, state.layout.config, state, command)
        return messages.CheckpointLoaded(state.step, manifest.parents, _recorded(state))

    def _read(
        self,
        model: Model,
        config: AdapterConfig,
        state: RunState | None,
        command: messages.RestoreRun | messages.LoadCheckpoint,
    ) -> tuple[RunState, Manifest]:
        """Restore a checkpoint or snapshot, into a state if it has the checkpoint's layout.

        Returns:
            The restored state, and the manifest.
        """
        manifest, files = read_checkpoint(self._vault, command.source, command.optimizer)
        if ADAPTER_FILE in files:
            config = model.config_of(config, files[ADAPTER_FILE])
        numerics = state.numerics if state is not None else None
        if isinstance(command, messages.RestoreRun):
            numerics = Numerics.recorded(command.environment)
        if command.optimizer:
            numerics = Numerics.recorded(manifest.environment) or numerics
        if state is None or state.layout.config != config:
            state = model.new_run(config, initialise=False)
        meta = {"step": manifest.step, "zero_moments": manifest.zero_moments}
        self._loaded.pop(command.run, None)
        state.restore(files, meta, optimizer=command.optimizer)
        state.numerics = numerics or state.numerics
        self._runs[command.run] = (model, state)
        self._loaded[command.run] = Loaded(
            {name: manifest.files[name] for name in files}, diverged=manifest.diverged
        )
        return state, manifest

    def _pass(self, command: messages.TrainingPass) -> _Steps:
        model, state = self._runs[command.run]
        self._loaded.pop(command.run, None)
        if not command.may_diverge:
            state.check_weights()
        try:
            request = read_request(self._home, command.body, command.stored)
        except RequestUnreadable:
            del self._runs[command.run]  # what was sent behind it must not be executed without it
            raise
        training_pass = decode_training_pass(request)
        del request
        result = yield from forward_backward(
            model,
            state,
            training_pass.examples,
            training_pass.loss_fn,
            training_pass.loss_fn_config,
            backward=not training_pass.forward_only,
        )
        return messages.PassDone(encode_forward_backward_output(result.outputs, result.metrics))

    def _optim_step(self, command: messages.OptimStep) -> _Steps:
        _, state = self._runs[command.run]
        self._loaded.pop(command.run, None)
        while not state.arena.wait_for_spare(_SPARE_SECONDS):
            yield
        _STEP_BEGUN()
        params = AdamParams(**command.params)
        return messages.OptimStepDone(optim_step(state, params, may_diverge=command.may_diverge))

    def _drop(self, command: messages.DropRun) -> _Steps:
        yield from ()
        self._runs.pop(command.run, None)
        self._loaded.pop(command.run, None)
        return messages.RunDropped()

    # Saves: captured in order with the run's other commands, written in the background.

    def _queue_save(self, call_id: int, command: messages.SaveRun) -> None:
        self._tasks.add(command.run, call_id, self._save(call_id, command))

    def _save(self, call_id: int, command: messages.SaveRun) -> Generator[None, None, None]:
        yield from ()
        try:
            model, state = self._runs[command.run]
            if not command.may_diverge:
                state.check_weights()
            loaded = self._loaded.get(command.run)
            snapshot = command.manifest["kind"] == "snapshot"
            capture = state.capture(
                optimizer=command.manifest["kind"] in _WITH_OPTIMIZER,
                zero_moments=not snapshot,
                diverged=loaded.diverged if loaded is not None else None,
            )
        except Exception as error:  # noqa: BLE001  one operation's failure is reported, not ours
            self._fail(call_id, error)
            return
        _CAPTURED()
        self._channel.send(call_id, messages.Captured())
        made_in = {**self._environment, **model.info.environment(), **_recorded(state)}
        stored = loaded.files if loaded is not None and snapshot else {}
        self._write(call_id, partial(self._write_state, capture, command, made_in, stored))

    def _write_state(
        self,
        capture: Capture,
        command: messages.SaveRun,
        made_in: Mapping[str, Any],
        stored: Mapping[str, FileRef],
    ) -> messages.RunSaved:
        """Write a captured state. Every earlier capture has been written by now, or failed."""
        request_id = command.manifest["request_id"]
        named = parent_of if request_id is not None else standing
        draft = {**command.manifest, "parents": named(command.line, self._unwritten)}
        try:
            written = self._write_checkpoint(
                self._vault, capture, draft, made_in, command.recipients, stored
            )
        except BaseException:
            if request_id is not None:
                self._unwritten.add(request_id)
            raise
        return messages.RunSaved(**written)

    def _write(self, call_id: int, job: Callable[[], messages.Reply]) -> None:
        """Do a job in the writer's thread and send its reply."""

        def write() -> None:
            self._page.begin_write(call_id)
            try:
                reply = job()
            except Exception as error:  # noqa: BLE001  that write fails, the worker goes on
                self._fail(call_id, error)
            else:
                self._channel.send(call_id, reply)
            self._page.end_write()

        self._writer.submit(write)

    def _import(self, call_id: int, command: messages.ImportAdapter) -> None:
        def write() -> messages.AdapterImported:
            model = self._models[command.model]
            made_in = {**self._environment, **model.info.environment()}
            return write_import(self._vault, model, command, made_in)

        self._write(call_id, write)

    def _encode(self, call_id: int, command: messages.Encode) -> None:
        try:
            tokenizer = self._models[command.model].tokenizer
            tokens = prompt_tokens(command.model, tokenizer, command.prompt)
        except Exception as error:  # noqa: BLE001  one prompt's failure is reported, not ours
            self._fail(call_id, error)
        else:
            self._channel.send(call_id, messages.Encoded(tokens))

    # Samples: one batch per model, one decode step per turn.

    def _sample(self, call_id: int, command: messages.Sample) -> None:
        name = command.model
        self._samplers.add(call_id, command)
        if name not in self._sampling:
            self._sampling.add(name)
            self._tasks.add(f"sampling {name}", SAMPLING, self._decode(name))

    def _watch(self, call_id: int, command: messages.Watch) -> None:
        self._samplers.watch(call_id, command.position)

    def _cancel(self, call_id: int, command: messages.Cancel) -> None:
        self._samplers.cancel(call_id)

    def _decode(self, name: str) -> Generator[None, None, None]:
        _SAMPLED()
        while self._samplers.step(name):
            yield
            _SAMPLED()
        self._sampling.discard(name)


def _recorded(state: RunState) -> dict[str, Any]:
    """Return a run's part of the numeric environment."""
    return state.numerics.environment()


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. For CPU memory torch says so in the text only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
