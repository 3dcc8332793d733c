"""Conversion of results to JSON for clients that don't read protobuf."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack

from fastapi import Request

from everstep.server.json_results import json_result_bytes
from everstep.server.piecewise import FileResponse
from everstep.server.requests import offload_of
from everstep.spool import Spool, freed, taken

INLINE_RESULT_BYTES = 16 << 10
"""Larger results are converted in another process. This many take 2 ms on the event loop."""
_JOB = "convert_result"
_PART_BYTES = 1 << 20


async def converted(kind: str, body: bytes, request: Request) -> bytes:
    """Convert the protobuf result of a sample or a training pass to JSON."""
    if len(body) <= INLINE_RESULT_BYTES:
        return json_result_bytes(kind, body)
    offload = offload_of(request)
    async with offload.spool(len(body)) as spool:
        await asyncio.to_thread(spool.write, body)
        _, content = await offload.run(_JOB, {"kind": kind}, spool)
        return await taken(content)


async def converted_response(
    kind: str, descriptor: int, offset: int, size: int, request: Request
) -> FileResponse:
    """Answer with a result that lies in a file, converted without a copy in this process's memory.

    Args:
        kind: of the operation.
        descriptor: of the file, which may be closed when this returns.
        offset: where the result begins.
        size: its bytes.
        request: the request.
    """
    offload = offload_of(request)
    async with offload.spool(size) as spool:
        await asyncio.to_thread(_copy, descriptor, offset, size, spool)
        _, content = await offload.run(_JOB, {"kind": kind}, spool)
    held = AsyncExitStack()
    held.push_async_callback(freed, content)
    return FileResponse(content.descriptor, 0, content.size, "application/json", held)


def _copy(descriptor: int, offset: int, size: int, spool: Spool) -> None:
    while spool.size < size:
        part = os.pread(descriptor, min(size - spool.size, _PART_BYTES), offset + spool.size)
        if not part:
            raise EOFError(f"a file ends within a result, at {spool.size} bytes")
        spool.write(part)
