"""Export of a session's timeline: asked for until the service has written it."""

from __future__ import annotations

import asyncio
from typing import Literal

from pydantic import BaseModel

from everstep.addresses import route
from everstep.client._transport.errors import TinkerError
from everstep.client._transport.session import Connection

_POLL_SECONDS = 5.0


class _TraceExport(BaseModel):
    status: Literal["pending", "ready", "failed"]
    url: str | None = None
    error: str | None = None


async def exported_trace(connection: Connection, session_id: str) -> str:
    """Return the URL of a session's timeline once the service has exported it.

    Raises:
        TinkerError: the export failed.
    """
    http = await connection.configured()
    path = route("sessions", session_id, "trace_export")
    while True:
        answer = await http.call("GET", path, _TraceExport)
        if answer.status == "ready" and answer.url is not None:
            return answer.url
        if answer.status != "pending":
            raise TinkerError(
                f"trace of {session_id} not exported: {answer.error or 'no reason given'}"
            )
        await asyncio.sleep(_POLL_SECONDS)
