"""Losses of users' own: kept in the ledger, found again by their ids, carried by passes.

A loss is an operation of its session: its graph is the operation's payload, so that it is there
after a restart, and a retry finds it. A pass that uses it is accepted with the graph in it: its
replay needs nothing but the pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import structlog

from everstep.engine.errors import InputError
from everstep.engine.loss_graph import LossProgram, loss_program, read_loss
from everstep.engine.validation import LOSS_ID, PROGRAM
from everstep.failpoints import Failpoint
from everstep.ledger import (
    Failure,
    Ledger,
    LedgerDamaged,
    NewOperation,
    Operation,
    SequenceConflict,
)
from everstep.runtime import names
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.payloads import payload_json
from everstep.wire import types
from everstep.wire.errors import ErrorCategory
from everstep.wire.passes import TrainingPass

_log = structlog.get_logger("everstep.losses")
_ACCEPTED = Failpoint("runtime.custom_loss.accepted", "a loss is in the ledger, its future isn't")


class CustomLosses:
    """Creates losses.

    Args:
        ledger: where they are kept.
        announce: called with each that was created.
    """

    def __init__(self, ledger: Ledger, announce: Callable[[Operation], None]) -> None:
        self._ledger = ledger
        self._announce = announce

    async def create(self, request: types.CreateCustomLossRequest) -> Operation:
        """Read a loss and keep it; a retry of the same request finds the first one.

        The session has to exist, and to be open for a new loss.

        Returns:
            The operation: succeeded, or failed for a graph that may not run here.

        Raises:
            Rejected: the place is taken by another loss.
        """
        loss = request.model_dump(mode="json", include={"name", "inputs", "graph"})
        failure = None
        try:
            loss_program(loss)
        except InputError as error:
            failure = Failure(str(error), ErrorCategory.USER)
        scope = names.loss_scope(request.session_id)
        new = NewOperation(
            scope,
            request.custom_loss_seq_id,
            names.CREATE_CUSTOM_LOSS,
            payload_json(loss),
            failure,
            request.session_id,
        )
        try:
            operation, _ = await self._ledger.accept(new)
        except SequenceConflict as conflict:
            raise Rejected(400, str(conflict)) from conflict
        _ACCEPTED()
        return await self._finish(operation)

    async def go_on(self, scope: str) -> None:
        """Finish what was accepted when the service ended."""
        try:
            for operation in await self._ledger.operations(scope, status="pending"):
                await self._finish(operation)
        except LedgerDamaged as damage:
            _log.error("losses can't be gone on with", scope=scope, because=str(damage))
            for operation in await self._ledger.corrupt(scope, str(damage)):
                self._announce(operation)

    async def _finish(self, operation: Operation) -> Operation:
        """There is nothing to compute: a loss that was read is one that can be used."""
        if operation.status == "pending":
            result = {
                "loss_id": names.loss_id(operation.scope, operation.seq_id),
                "type": "create_custom_loss",
            }
            operation = await self._ledger.succeed(
                operation.request_id, json.dumps(result).encode(), "json"
            )
            self._announce(operation)
        return operation


async def with_program(
    ledger: Ledger, session_id: str, request: TrainingPass
) -> tuple[TrainingPass, LossProgram]:
    """A pass that uses a loss of its session's own, with the loss in it.

    Raises:
        OperationFailed: it names no loss of the session.
    """
    config = request.loss_fn_config
    if set(config) != {LOSS_ID} or not isinstance(config[LOSS_ID], str):
        raise OperationFailed(
            "Loss 'custom' takes loss_fn_config {'loss_id': TEXT} and nothing else; got "
            f"{', '.join(sorted(config)) or 'nothing'}. create_custom_loss gives the id."
        )
    loss_id = str(config[LOSS_ID])
    scope = names.loss_scope(session_id)
    prefix, _, number = loss_id.rpartition(":")
    operation = None
    if prefix == scope and number.isascii() and number.isdecimal() and len(number) < 19:
        operation = await ledger.operation_at(scope, int(number))
    if operation is None or operation.kind != names.CREATE_CUSTOM_LOSS:
        raise OperationFailed(
            f"Loss {loss_id[:200]!r} does not exist in this run's session; a loss belongs to the "
            "session that created it (create_custom_loss)."
        )
    if operation.failure is not None:
        raise OperationFailed(f"Loss {loss_id!r} was not created: {operation.failure.message}")
    text = operation.payload.decode()
    return replace(request, loss_fn_config={**config, PROGRAM: text}), read_loss(text)
