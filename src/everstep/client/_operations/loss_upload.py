"""Upload of a traced custom loss to a service that evaluates it itself."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic

from everstep.client._operations import submit as ops
from everstep.client._operations.loss_handle import LossHandle, encode
from everstep.client._transport.long_poll import RequestInfo
from everstep.client._transport.session import Session
from everstep.wire import types


async def upload(session: Session, traced: LossHandle) -> LossHandle:
    """Bind a traced loss to a session, and upload it if the service evaluates losses.

    Args:
        session: the session, which is opened if needed.
        traced: the loss.
    """
    session_id = await session.id()
    handle = replace(traced, session_id=session_id)
    if not session.config.custom_loss_server_side:
        return handle
    seq_id = session.next_id("custom_loss")
    request = types.CreateCustomLossRequest(
        session_id=session_id,
        custom_loss_seq_id=seq_id,
        name=handle.name,
        inputs=list(handle.inputs),
        graph=encode(handle),
    )
    info = RequestInfo("CreateCustomLoss", monotonic())
    answer = types.CreateCustomLossResponse
    work = ops.create(session, "/create_custom_loss", request, info, answer)
    _, created = await ops.reported(session, info.request_type, None, seq_id, work)
    return replace(handle, loss_id=created.loss_id)
