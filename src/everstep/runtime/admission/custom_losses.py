"""Custom losses: loss graphs of clients, stored in the ledger and used by passes.

A custom loss is an operation of its session, with the graph as its payload. So it survives a
restart, and a retry finds it. A pass that uses it is accepted with the graph inside: replaying the
pass needs nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from everstep.engine.errors import InputError
from everstep.engine.losses.graph_read import LossProgram, parse_loss, parse_loss_json
from everstep.engine.losses.specs import LOSS_ID, PROGRAM
from everstep.failpoints import Failpoint
from everstep.ledger import (
    Failure,
    Ledger,
    LedgerDamaged,
    NewOperation,
    Operation,
    SequenceConflict,
)
from everstep.logs import get_logger
from everstep.runtime import ids
from everstep.runtime.errors import OperationFailed, Rejected
from everstep.runtime.payloads import payload_json
from everstep.wire import types
from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.passes import TrainingPass

_log = get_logger("everstep.losses")
_ACCEPTED = Failpoint("runtime.custom_loss.accepted", "a loss is in the ledger, its future isn't")


class CustomLosses:
    """Creates custom losses.

    Args:
        ledger: stores them.
        on_finished: called with each operation that succeeded or failed.
    """

    def __init__(self, ledger: Ledger, on_finished: Callable[[Operation], None]) -> None:
        self._ledger = ledger
        self._on_finished = on_finished

    async def create(self, request: types.CreateCustomLossRequest) -> Operation:
        """Validate a loss and store it. A retry of the same request finds the first one.

        Args:
            request: a loss of a session that exists and, for a new loss, is open.

        Returns:
            The operation: succeeded, or failed if the graph is not valid.

        Raises:
            Rejected: another loss has its ``custom_loss_seq_id``.
        """
        loss = request.model_dump(mode="json", include={"name", "inputs", "graph"})
        failure = None
        try:
            parse_loss(loss)
        except InputError as error:
            failure = Failure(str(error), ErrorCategory.USER)
        scope = ids.loss_scope(request.session_id)
        new = NewOperation(
            scope,
            request.custom_loss_seq_id,
            ids.CREATE_CUSTOM_LOSS,
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

    async def resume(self, scope: str) -> None:
        """Finish the losses that were accepted when the service ended."""
        try:
            for operation in await self._ledger.operations(scope, status="pending"):
                await self._finish(operation)
        except LedgerDamaged as damage:
            _log.error("custom losses can't be resumed", scope=scope, reason=str(damage))
            for operation in await self._ledger.mark_corrupted(scope, str(damage)):
                self._on_finished(operation)

    async def _finish(self, operation: Operation) -> Operation:
        """Record success. There is nothing to compute."""
        if operation.status == "pending":
            result = {
                "loss_id": ids.loss_id(operation.scope, operation.seq_id),
                "type": "create_custom_loss",
            }
            operation = await self._ledger.succeed(
                operation.request_id, json.dumps(result).encode(), "json"
            )
            self._on_finished(operation)
        return operation


async def with_program(
    ledger: Ledger, session_id: str, request: TrainingPass
) -> tuple[TrainingPass, LossProgram]:
    """Put the graph of the custom loss that a pass names into the pass.

    Args:
        ledger: holds the losses.
        session_id: the session of the pass's run.
        request: the pass.

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
    scope = ids.loss_scope(session_id)
    prefix, _, number = loss_id.rpartition(":")
    operation = None
    if prefix == scope and number.isascii() and number.isdecimal() and len(number) < 19:
        operation = await ledger.operation_by_seq_id(scope, int(number))
    if operation is None or operation.kind != ids.CREATE_CUSTOM_LOSS:
        raise OperationFailed(
            f"Loss {loss_id[:200]!r} does not exist in this run's session; a loss belongs to the "
            "session that created it (create_custom_loss)."
        )
    if operation.failure is not None:
        raise OperationFailed(f"Loss {loss_id!r} was not created: {operation.failure.message}")
    text = operation.payload.decode()
    return replace(request, loss_fn_config={**config, PROGRAM: text}), parse_loss_json(text)
