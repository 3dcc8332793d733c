"""Training: executes passes and steps of the optimizer, for the first time or in a replay."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, TypeVar

from everstep.ledger import Operation
from everstep.runtime import ids
from everstep.runtime.errors import RequestUnreadable, WorkerLost
from everstep.runtime.execution.run import Run
from everstep.runtime.workers.base import Call
from everstep.runtime.workers.stored_requests import request_of
from everstep.spool import Data
from everstep.worker.protocol import messages

R = TypeVar("R", bound=messages.Reply)


async def training_pass(
    run: Run, operation: Operation, *, again: bool = False
) -> tuple[Data, float]:
    """Run forward or forward_backward.

    Args:
        run: the run.
        operation: the pass, with or without its request.
        again: it succeeded before, whatever this release says of its weights.

    Returns:
        The encoded output, and the seconds it took.

    Raises:
        LedgerDamaged: its request is damaged.
        WorkerLost: the worker could not read the request, which is whole. It has dropped the run.
            From now on it is sent requests.
    """
    ledger, home = run.context.ledger, run.context.home
    async with request_of(ledger, home, operation, as_bytes=run.sends_requests) as request:
        body, stored = request
        command = messages.TrainingPass(run.run_id, body, again, stored)
        try:
            reply = await _execute(run, operation, command, again=again)
        except RequestUnreadable as error:
            run.detach()
            await ledger.contents.fill(operation)
            run.sends_requests = True
            raise WorkerLost(f"a request could not be read by the worker: {error}") from error
    return reply.body, reply.seconds


async def optim_step(
    run: Run, operation: Operation, *, again: bool = False
) -> tuple[dict[str, Any], float]:
    """Take one step of the optimizer.

    Args:
        run: the run.
        operation: the step.
        again: it was made before: what the settings allow now does not matter.

    Returns:
        The operation's result, and the seconds it took.
    """
    reply = await _execute(run, operation, _optim_step(run, operation, again=again), again=again)
    return {"metrics": reply.metrics, "type": "optim_step"}, reply.seconds


async def _execute(
    run: Run, operation: Operation, command: messages.Command[R], *, again: bool
) -> R:
    """Return the reply to a command. The next one may be sent ahead, unless this is a replay."""
    if again:
        return await run.call(command)
    ahead = run.lookahead
    send = partial(ahead.begin, operation, partial(run.send, command), partial(_send_next, run))
    try:
        return await run.context.eviction.making_room(run.run_id, send)
    finally:
        ahead.end()


async def _send_next(run: Run, operation: Operation) -> Call[Any]:
    """Send the command of an operation whose request lies in its row."""
    if operation.kind == ids.OPTIM_STEP:
        return await run.send(_optim_step(run, operation, again=False))
    return await run.send(messages.TrainingPass(run.run_id, operation.payload))


def _optim_step(run: Run, operation: Operation, *, again: bool) -> messages.OptimStep:
    params = json.loads(operation.payload)["params"]
    may_diverge = again or run.context.settings.allow_diverged
    return messages.OptimStep(run.run_id, params, may_diverge)
