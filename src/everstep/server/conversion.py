"""Conversion of results to JSON for clients that don't read protobuf."""

from __future__ import annotations

import asyncio

from fastapi import Request

from everstep.server.json_results import json_result_bytes
from everstep.server.offload.pool import taken
from everstep.server.requests import offload_of

INLINE_RESULT_BYTES = 16 << 10
"""Larger results are converted in another process. This many take 2 ms on the event loop."""


async def converted(kind: str, body: bytes, request: Request) -> bytes:
    """Convert the protobuf result of a sample or a training pass to JSON."""
    if len(body) <= INLINE_RESULT_BYTES:
        return json_result_bytes(kind, body)
    offload = offload_of(request)
    async with offload.spool(len(body)) as spool:
        await asyncio.to_thread(spool.write, body)
        _, content = await offload.run("convert_result", {"kind": kind}, spool)
        return await taken(content)
