"""What a worker does on each command of the service.

========== =============================================================== =====================
command    effect                                                          reply
========== =============================================================== =====================
create     a new run from its seed                                         done
restore    a run from a checkpoint or snapshot                             done
load       a checkpoint into a live run                                    done
pass       forward or forward_backward of one training pass                done + output
optim_step one step of the optimizer                                       done + metrics
save       capture now, write in the background                            captured, then done
sample     sequences and logprobs                                          done + output
watch      tell of a sample as it is drawn, from a position on             drawn, again and again
cancel     stop a sample                                                   none
encode     a text or a conversation                                        done + tokens
drop       forget a run                                                    done
import     an adapter from outside becomes a checkpoint                    done
collect    remove unreferenced files of the vault                          done
========== =============================================================== =====================

Any command may reply ``failed`` with a text and a category instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import structlog
import torch

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
from everstep.failpoints import Failpoint
from everstep.runtime.channel import BlockingChannel, Message
from everstep.runtime.importing import write_import
from everstep.runtime.lineage import parent_of, standing
from everstep.runtime.progress import SAMPLING
from everstep.runtime.prompts import prompt_tokens
from everstep.runtime.samplers import Samplers
from everstep.runtime.saving import read_checkpoint, write_checkpoint
from everstep.runtime.turns import Turns
from everstep.vault import StoreFailed, Vault, VaultError
from everstep.wire.proto import decode_training_pass, encode_forward_backward_output
from everstep.wire.streams import DrawnTokens

_log = structlog.get_logger("everstep.worker")
_BEGUN = Failpoint("worker.command.begun", "a command is about to be executed")
_STEP_BEGUN = Failpoint("worker.optim_step.begun", "a step of the optimizer is about to be made")
_DONE = Failpoint("worker.command.done", "a command is executed, the service was not told")
_CAPTURED = Failpoint("worker.save.captured", "a state is captured, nothing of it is written")
_SAMPLED = Failpoint("worker.sample.step", "a step of sampling is about to be made")
_WITH_OPTIMIZER = ("training", "snapshot")
_Reply = tuple[dict[str, Any], bytes]
_Steps = Generator[None, None, _Reply]


class Commands:
    """The worker's state and its commands.

    Args:
        models: the base models by name.
        vault: where checkpoints lie.
        channel: where replies go.
        turns: where the steps of long commands wait for their turn.
        prefix_bytes: what keys and values of prompts may take together.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        vault: Vault,
        channel: BlockingChannel,
        turns: Turns,
        prefix_bytes: int,
    ) -> None:
        self._models = models
        self._vault = vault
        self._channel = channel
        self._turns = turns
        self._runs: dict[str, tuple[Model, RunState]] = {}
        self._samplers = Samplers(
            models, vault, self._finish, self._fail, self._drawn, prefix_bytes
        )
        self._sampling: set[str] = set()
        self._unwritten: set[str] = set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint writer")
        self._steps: dict[str, Callable[[Message], _Steps]] = {
            "create": self._create,
            "restore": self._restore,
            "load": self._load,
            "pass": self._pass,
            "optim_step": self._optim_step,
            "drop": self._drop,
        }

    def handle(self, message: Message) -> None:
        """Take one command: queue its steps behind the others of its run."""
        command = message.header["command"]
        if command == "sample":
            self._sample(message)
        elif command == "watch":
            self._samplers.watch(message.header["id"], message.header["position"])
        elif command == "cancel":
            self._samplers.cancel(message.header["id"])
        elif command == "save":
            self._turns.add(message.header["run"], message.header["id"], self._save(message))
        elif command == "encode":
            self._encode(message)
        elif command == "collect":
            self._writer.submit(self._collect, message)
        elif command == "import":
            self._writer.submit(self._import, message)
        else:
            task = self._answered(message, self._steps[command](message))
            self._turns.add(message.header["run"], message.header["id"], task)

    def _answered(self, message: Message, steps: _Steps) -> Generator[None, None, None]:
        """Run a command's steps and send what comes of it."""
        seconds = 0.0
        _BEGUN()
        while True:
            begin = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                reply, body = end.value
                seconds += time.perf_counter() - begin
                _DONE()
                self._finish(message.header["id"], {**reply, "seconds": seconds}, body)
                return
            except Exception as error:  # noqa: BLE001  one operation's failure is reported, not ours
                self._fail(message.header["id"], error)
                return
            seconds += time.perf_counter() - begin
            yield

    def _finish(self, call_id: int, reply: Mapping[str, Any], body: bytes = b"") -> None:
        self._channel.send({"id": call_id, "event": "done", **reply}, body)

    def _drawn(self, call_id: int, drawn: Sequence[DrawnTokens]) -> None:
        positions = [each.model_dump(exclude_none=True) for each in drawn]
        self._channel.send({"id": call_id, "event": "drawn", "drawn": positions})

    def _fail(self, call_id: int, error: BaseException) -> None:
        by_user = isinstance(error, InputError)
        if not by_user:
            _log.error("operation failed", error=repr(error), exc_info=error)
        told = by_user or isinstance(error, VaultError | StoreFailed)
        text = str(error) if told else repr(error)
        if _out_of_memory(error):
            text = f"There was not enough memory for this operation; make it smaller. {text}"
        category = "user" if by_user else "server"
        unreachable = isinstance(error, StoreFailed)
        self._channel.send(
            {
                "id": call_id,
                "event": "failed",
                "message": text,
                "category": category,
                "unreachable": unreachable,
            }
        )

    # Commands of a run, each a generator that yields between its steps.

    def _create(self, message: Message) -> _Steps:
        yield from ()
        model = self._models[message.header["model"]]
        state = model.new_run(AdapterConfig(**message.header["adapter"]))
        self._runs[message.header["run"]] = (model, state)
        return {"bytes": state.nbytes}, b""

    def _restore(self, message: Message) -> _Steps:
        yield from ()
        model = self._models[message.header["model"]]
        state = model.new_run(AdapterConfig(**message.header["adapter"]))
        parents = self._read_into(state, message)
        self._runs[message.header["run"]] = (model, state)
        return {"step": state.step, "bytes": state.nbytes, "parents": parents}, b""

    def _load(self, message: Message) -> _Steps:
        yield from ()
        _, state = self._runs[message.header["run"]]
        parents = self._read_into(state, message)
        return {"step": state.step, "parents": parents}, b""

    def _read_into(self, state: RunState, message: Message) -> list[str]:
        """Restore a state from a checkpoint or snapshot; returns what that descends from."""
        optimizer = bool(message.header["optimizer"])
        manifest, files = read_checkpoint(self._vault, message.header["source"], optimizer)
        meta = {"step": manifest.step, "lora": manifest.lora, "optimizer": manifest.optimizer}
        state.restore(files, meta, optimizer=optimizer)
        return manifest.parents

    def _pass(self, message: Message) -> _Steps:
        model, state = self._runs[message.header["run"]]
        training_pass = decode_training_pass(message.body)
        result = yield from forward_backward(
            model,
            state,
            training_pass.examples,
            training_pass.loss_fn,
            training_pass.loss_fn_config,
            backward=not training_pass.forward_only,
        )
        return {}, encode_forward_backward_output(result.outputs, result.metrics)

    def _optim_step(self, message: Message) -> _Steps:
        yield from ()
        _, state = self._runs[message.header["run"]]
        _STEP_BEGUN()
        return {"metrics": optim_step(state, AdamParams(**message.header["params"]))}, b""

    def _drop(self, message: Message) -> _Steps:
        yield from ()
        self._runs.pop(message.header["run"], None)
        return {}, b""

    # Saves: captured in turn, written behind.

    def _save(self, message: Message) -> Generator[None, None, None]:
        yield from ()
        header = message.header
        try:
            model, state = self._runs[header["run"]]
            capture = state.capture(optimizer=header["manifest"]["kind"] in _WITH_OPTIMIZER)
        except Exception as error:  # noqa: BLE001  one operation's failure is reported, not ours
            self._fail(header["id"], error)
            return
        _CAPTURED()
        self._channel.send({"id": header["id"], "event": "captured"})
        made_in = {**environment(), "dtype": model.info.dtype}
        self._writer.submit(
            self._write, header["id"], partial(self._write_state, capture, header, made_in)
        )

    def _write_state(
        self, capture: Capture, header: Mapping[str, Any], made_in: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write what was captured; what was captured before it is written by now, or failed."""
        draft = header["manifest"]
        request_id = draft["request_id"]
        named = parent_of if request_id is not None else standing
        draft = {**draft, "parents": named(header["line"], self._unwritten)}
        try:
            return write_checkpoint(self._vault, capture, draft, made_in, header["recipients"])
        except BaseException:
            if request_id is not None:
                self._unwritten.add(request_id)
            raise

    def _write(self, call_id: int, job: Callable[[], dict[str, Any]]) -> None:
        try:
            reply = job()
        except Exception as error:  # noqa: BLE001  that save fails, the run goes on
            self._fail(call_id, error)
        else:
            self._finish(call_id, reply)

    def _collect(self, message: Message) -> None:
        def collect() -> dict[str, Any]:
            removed = self._vault.collect(message.header["grace_seconds"])
            return {"files": [[ref.blake3, ref.size] for ref in removed]}

        self._write(message.header["id"], collect)

    def _import(self, message: Message) -> None:
        def write() -> dict[str, Any]:
            model = self._models[message.header["model"]]
            made_in = {**environment(), "dtype": model.info.dtype}
            return write_import(self._vault, model, message.header, made_in)

        self._write(message.header["id"], write)

    def _encode(self, message: Message) -> None:
        name = message.header["model"]
        try:
            tokens = prompt_tokens(name, self._models[name].tokenizer, message.body)
        except Exception as error:  # noqa: BLE001  one prompt's failure is reported, not ours
            self._fail(message.header["id"], error)
        else:
            self._finish(message.header["id"], {"tokens": tokens})

    # Samples: one batch a model, one decode step a turn.

    def _sample(self, message: Message) -> None:
        name = message.header["model"]
        self._samplers.add(message)
        if name not in self._sampling:
            self._sampling.add(name)
            self._turns.add(f"sampling {name}", SAMPLING, self._decode(name))

    def _decode(self, name: str) -> Generator[None, None, None]:
        _SAMPLED()
        while self._samplers.step(name):
            yield
            _SAMPLED()
        self._sampling.discard(name)


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch says so of the CPU's memory in its words only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
