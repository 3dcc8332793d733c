"""One run's commands to the worker that holds it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from everstep.engine.info import ModelInfo
from everstep.ledger import Checkpoint, Ledger, Run
from everstep.runtime.channel import Message
from everstep.runtime.checkpoints import Checkpoints, path_of
from everstep.runtime.errors import OperationFailed, RuntimeFault, RunUnavailable, VaultUnreachable
from everstep.runtime.lineage import Line, Lineage
from everstep.runtime.residency import Residency
from everstep.runtime.worker_process import Call, WorkerProcess
from everstep.vault import CheckpointId
from everstep.wire.errors import ErrorCategory

_LORA_FIELDS = ("rank", "alpha", "train_attn", "train_mlp", "train_unembed", "modules")


class RunCommands:
    """Sends a run's commands, and knows whether the run is in the worker's memory.

    Args:
        run_id: the run.
        ledger: where its row is.
        worker: where it lives.
        checkpoints: where paths are resolved.
        residency: told when the run comes into memory, is used and leaves.

    Attributes:
        lineage: what its state in the worker's memory descends from.
    """

    def __init__(
        self,
        run_id: str,
        ledger: Ledger,
        worker: WorkerProcess,
        checkpoints: Checkpoints,
        residency: Residency,
    ) -> None:
        self.run_id = run_id
        self.lineage = Lineage()
        self._ledger = ledger
        self._worker = worker
        self._checkpoints = checkpoints
        self._residency = residency
        self._generation = -1

    @property
    def resident(self) -> bool:
        """Whether the run is in the memory of the worker that runs now."""
        return self._worker.ready and self._generation == self._worker.generation

    async def attach(self) -> None:
        """Wait for a worker, and mean that one from now on."""
        self._generation = await self._worker.wait_ready()

    def forget(self) -> None:
        """Take the run as not resident, whatever the worker holds."""
        self._generation = -1
        self._residency.left(self.run_id)

    async def run(self) -> Run:
        """The run's row."""
        run = await self._ledger.run(self.run_id)
        if run is None:
            raise RuntimeFault(f"run {self.run_id} has operations but no row in the ledger")
        return run

    def environment(self, run: Run) -> dict[str, Any]:
        """The numeric environment that the run would go on in; raises as `model` does."""
        info = self.model(run)
        own = {"dtype": info.dtype, "base_fingerprint": info.fingerprint}
        return {**self._worker.environment, **own}

    def model(self, run: Run) -> ModelInfo:
        """The run's base model.

        Raises:
            RunUnavailable: this service doesn't serve it.
        """
        info = self._worker.models.get(run.base_model)
        if info is None:
            raise RunUnavailable(
                f"its base model {run.base_model} is not served; start the service with "
                f"--model {run.base_model}"
            )
        return info

    async def create(self, run: Run) -> None:
        """Make the run from its seed."""
        await self._place({"command": "create", "model": run.base_model, "adapter": run.lora})
        self.lineage.begin([])

    async def restore(self, run: Run, source: Mapping[str, str], *, optimizer: bool) -> None:
        """Make the run from a checkpoint or snapshot in the vault."""
        command = {"command": "restore", "model": run.base_model, "adapter": run.lora}
        async with self._following():
            reply = await self._place({**command, "source": source, "optimizer": optimizer})
        self._stand_on(source, reply)

    async def restore_path(self, run: Run, path: str, *, optimizer: bool) -> None:
        """Make the run from the checkpoint of a path."""
        checkpoint = await self._checkpoints.loadable(path, optimizer=optimizer)
        await self.restore(run, self._checkpoints.source(checkpoint), optimizer=optimizer)

    async def load(self, path: str, *, optimizer: bool) -> None:
        """Load the checkpoint of a path into the live run."""
        checkpoint = await self._checkpoints.loadable(path, optimizer=optimizer)
        _check_compatible(checkpoint, await self.run())
        source = self._checkpoints.source(checkpoint)
        async with self._following():
            command = {"command": "load", "source": source, "optimizer": optimizer}
            reply = await self.done(command)
        self._stand_on(source, reply)

    async def training_pass(self, payload: bytes) -> Message:
        """Forward or forward_backward of an encoded pass."""
        return await self.done({"command": "pass"}, payload)

    async def optim_step(self, payload: Mapping[str, Any]) -> Message:
        """One step of the optimizer."""
        return await self.done({"command": "optim_step", **payload})

    async def drop(self) -> None:
        """Let the run leave the worker's memory."""
        await self.done({"command": "drop"})
        self.forget()

    async def save(
        self, manifest: Mapping[str, Any], line: Line, recipients: Sequence[str] = ()
    ) -> Call:
        """Begin to write the run's state, encrypted if there are recipients.

        Args:
            manifest: what the service knows of it.
            line: what the state descends from.
            recipients: for whom it is encrypted.
        """
        command = {"command": "save", "manifest": manifest, "line": list(line)}
        return await self._call({**command, "recipients": list(recipients)})

    async def done(self, header: Mapping[str, Any], body: bytes = b"") -> Message:
        """Send a command and wait for its reply; raises `OperationFailed`, `WorkerLost`."""
        return await (await self._call(header, body)).done

    def _stand_on(self, source: Mapping[str, str], loaded: Message) -> None:
        path = path_of(CheckpointId(source["kind"], source["run"], source["name"]))
        behind = loaded.header["parents"]
        self.lineage.begin([path, *behind] if path is not None else behind)

    @asynccontextmanager
    async def _following(self) -> AsyncIterator[None]:
        """Where a checkpoint can't be read, it may have gone to quarantine: the index follows."""
        try:
            yield
        except OperationFailed as failure:
            unreachable = isinstance(failure, VaultUnreachable)
            if failure.category == ErrorCategory.SERVER and not unreachable:
                await self._checkpoints.follow_quarantine()
            raise

    async def _place(self, header: Mapping[str, Any]) -> Message:
        """Have the run made in the worker's memory, and account for what it takes."""
        reply = await self.done(header)
        self._residency.came(self.run_id, int(reply.header["bytes"]))
        return reply

    async def _call(self, header: Mapping[str, Any], body: bytes = b"") -> Call:
        self._residency.used(self.run_id)
        return await self._worker.call({**header, "run": self.run_id}, body, self._generation)


def _check_compatible(checkpoint: Checkpoint, run: Run) -> None:
    """Raise `OperationFailed` naming each field in which a checkpoint doesn't fit a run."""
    pairs: list[tuple[str, Any, Any]] = [("base_model", checkpoint.base_model, run.base_model)]
    pairs += [(field, checkpoint.lora.get(field), run.lora.get(field)) for field in _LORA_FIELDS]
    wrong = [
        f"checkpoint {field} is {theirs} but target model {field} is {ours}"
        for field, theirs, ours in pairs
        if theirs != ours
    ]
    if wrong:
        raise OperationFailed(
            "Checkpoint model configuration is incompatible with target model: "
            f"{'; '.join(wrong)}. Create a training client from the checkpoint instead.",
            ErrorCategory.USER,
        )
