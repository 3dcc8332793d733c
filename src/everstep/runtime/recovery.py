"""Bringing a run back: the newest state that verifies, then the ledger's operations in order.

Operations that were finished before are applied again, and what they give is compared with what
was recorded. A difference is never papered over: the run is then corrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import structlog

from everstep.failpoints import Failpoint
from everstep.ledger import Ledger, Operation, Run
from everstep.runtime import names
from everstep.runtime.errors import (
    OperationFailed,
    RunCorrupted,
    RunUnavailable,
    VaultUnreachable,
)
from everstep.runtime.replay import difference
from everstep.runtime.run_commands import RunCommands
from everstep.runtime.snapshots import Snapshots
from everstep.wire.errors import ErrorCategory
from everstep.wire.paths import CheckpointKind, TinkerPath

_log = structlog.get_logger("everstep.run")
_RESTORED = Failpoint("runtime.recover.restored", "a state is in memory, nothing is replayed")
_REPLAYED = Failpoint("runtime.recover.replayed", "an operation is applied again")


class Recovery:
    """Restores one run and replays its operations.

    Args:
        commands: to the worker.
        ledger: where its operations are.
        snapshots: finds the run's states.

    Attributes:
        foreign: the results since the newest state were made in another numeric environment.
        restored: the position of the snapshot or checkpoint that the run was brought back from.
    """

    def __init__(self, commands: RunCommands, ledger: Ledger, snapshots: Snapshots) -> None:
        self._commands = commands
        self._ledger = ledger
        self._snapshots = snapshots
        self.foreign = False
        self.restored = -1

    async def restore(self, before: int | None) -> int:
        """Bring the run into the worker's memory.

        Args:
            before: the state must stand before this operation; None: the newest will do.

        Returns:
            The sequence id of the last operation that the state includes.

        Raises:
            RunUnavailable: the service can't have it now, but may later.
            VaultUnreachable, StoreFailed: the vault's store does not answer.
            RunCorrupted: no state is left that it could be brought back from.
        """
        await self._commands.attach()
        run = await self._commands.run()
        self._compare_environments(run)
        damaged: list[str] = []
        for manifest in await self._snapshots.newest_first(run.run_id):
            if before is not None and manifest.position >= before:
                continue
            self._check_base(run, manifest.base_fingerprint, manifest.environment)
            source = {"kind": manifest.kind, "run": run.run_id, "name": manifest.name}
            try:
                await self._commands.restore(run, source, optimizer=True)
            except VaultUnreachable:
                raise
            except OperationFailed as failure:
                _log.error("a state can't be used", run=run.run_id, reason=failure.message)
                damaged.append(failure.message)
                continue
            self.restored = manifest.position
            _RESTORED()
            return manifest.position
        return await self._restore_origin(run, damaged)

    async def apply_again(self, operation: Operation) -> float:
        """Apply a finished operation once more.

        Returns:
            Seconds of computation.

        Raises:
            RunCorrupted: it doesn't give what it gave before.
            RunUnavailable: nor is it near that in another environment, where it may be sound.
        """
        if operation.status == "succeeded" and operation.kind == names.SAVE_WEIGHTS:
            name = json.loads(operation.payload)["name"]
            path = TinkerPath(operation.scope, CheckpointKind.TRAINING, name)
            self._commands.lineage.stand_on(str(path))
        if operation.status != "succeeded" or operation.kind not in names.CHANGES_STATE:
            return 0.0
        try:
            replayed, seconds = await self._again(operation)
        except VaultUnreachable:
            raise
        except OperationFailed as failure:
            raise RunCorrupted(self._text(operation, failure.message)) from failure
        if replayed is not None:
            recorded, media = operation.result or b"", operation.media
            found = difference(recorded, media, replayed, exact=not self.foreign)
            if found is not None and self.foreign:
                raise RunUnavailable(
                    f"in this numeric environment operation {operation.seq_id} ({operation.kind}) "
                    f"is not near what it gave before: {found}; start the service in the former one"
                )
            if found is not None:
                raise RunCorrupted(self._text(operation, found))
        _REPLAYED()
        return seconds

    async def _again(self, operation: Operation) -> tuple[bytes | dict[str, Any] | None, float]:
        if operation.pruned:
            raise RunCorrupted(
                f"Run {operation.scope} is corrupted: its newest two snapshots are damaged, and "
                f"what operation {operation.seq_id} asked is kept no longer than they need it. "
                "Create a new run from its last checkpoint."
            )
        if operation.kind == names.FORWARD_BACKWARD:
            reply = await self._commands.training_pass(operation.payload)
            return reply.body, float(reply.header["seconds"])
        payload = json.loads(operation.payload)
        if operation.kind == names.OPTIM_STEP:
            reply = await self._commands.optim_step(payload)
            return optim_step_result(reply.header), float(reply.header["seconds"])
        await self._commands.load(payload["path"], optimizer=payload["optimizer"])
        return None, 0.0

    async def _restore_origin(self, run: Run, damaged: list[str]) -> int:
        """Bring the run back from what created it."""
        origin = await self._ledger.operation_at(run.run_id, 0)
        if origin is None:
            raise RunCorrupted(
                f"Run {run.run_id} is corrupted: none of its states can be read, and nothing says "
                f"how it began. {' '.join(damaged)}"
            )
        if origin.kind == names.CREATE_MODEL:
            await self._commands.create(run)
        else:
            payload = json.loads(origin.payload)
            try:
                await self._commands.restore_path(
                    run, payload["path"], optimizer=payload["optimizer"]
                )
            except VaultUnreachable:
                raise
            except OperationFailed as failure:
                if failure.category == ErrorCategory.SERVER and not damaged:
                    raise
                raise RunCorrupted(
                    f"Run {run.run_id} is corrupted: none of its states can be read, nor the "
                    f"checkpoint it came from. {' '.join([*damaged, failure.message])}"
                ) from failure
        self.restored = 0
        _RESTORED()
        return 0

    def _compare_environments(self, run: Run) -> None:
        current = self._commands.environment(run)
        self.foreign = run.environment is not None and run.environment != current
        if not self.foreign or run.environment is None:
            return
        recorded = str(run.environment.get("base_fingerprint", ""))
        self._check_base(run, recorded, run.environment)
        changed = {
            key: f"{run.environment.get(key)} → {current.get(key)}"
            for key in sorted({*run.environment, *current})
            if run.environment.get(key) != current.get(key)
        }
        _log.warning(
            "the numeric environment has changed; replayed results are compared to a tolerance",
            run=run.run_id,
            **changed,
        )

    def _check_base(self, run: Run, fingerprint: str, made_in: Mapping[str, Any]) -> None:
        """Refuse other weights; in another dtype the same ones have another fingerprint."""
        served = self._commands.model(run)
        if made_in.get("dtype", served.dtype) != served.dtype:
            return
        if fingerprint and fingerprint != served.fingerprint:
            raise RunUnavailable(
                f"its base model {run.base_model} has other weights than when it was trained; "
                "serve the former ones under that name"
            )

    def _text(self, operation: Operation, found: str) -> str:
        return (
            f"Run {operation.scope} is corrupted: replayed operation {operation.seq_id} "
            f"({operation.kind}) does not give what it gave before: {found}. Create a new run "
            "from its last checkpoint."
        )


def optim_step_result(header: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an optimizer step, from the worker's reply."""
    return {"metrics": header["metrics"], "type": "optim_step"}
