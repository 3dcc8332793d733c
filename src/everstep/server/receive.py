"""Receiving: bodies of requests, bounded, and large ones on their way off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from everstep.runtime import Rejected
from everstep.server.client_info import client_of
from everstep.server.offload.jobs import raise_described
from everstep.server.offload.pool import INLINE_BYTES, spooled
from everstep.server.passes import MAX_BODY_BYTES
from everstep.server.requests import offload_of
from everstep.spool import Spool, freed
from everstep.wire.base import Request as Message
from everstep.wire.base import parse
from everstep.wire.codecs.body import decompress, too_large
from everstep.wire.errors import BodyTooLarge

Body = TypeVar("Body", bound=Message)
MAX_MESSAGE_BYTES = 4 << 20
"""Of a message in JSON that holds neither a pass nor a sample: its parser holds the interpreter's
lock for tens of milliseconds."""
_MAX_DISCARDED_BYTES = 1 << 30
_MAX_SILENCE_SECONDS = 60.0
"""A large body that doesn't arrive takes the room of others."""


@dataclass(frozen=True)
class Received:
    """The start of a body.

    Attributes:
        start: its first bytes: all of a small body.
        rest: the parts that were not read yet, or None if the start is all.
    """

    start: bytes
    rest: AsyncIterator[bytes] | None

    def plain(self, encoding: str | None) -> bytes | None:
        """Return the whole body decompressed, or None if it is large.

        Raises:
            InvalidRequest: its encoding is unknown, or it is damaged.
        """
        if self.rest is not None:
            return None
        try:
            return decompress(self.start, encoding, INLINE_BYTES)
        except BodyTooLarge:
            return None

    async def each(self, write: Callable[[bytes], None], limit: int) -> int:
        """Hand on the parts of the body, as far as they are within a limit, and return its size.

        Bytes beyond the limit are read and discarded, up to another one: many clients look for an
        answer only once they have sent everything.

        Raises:
            Rejected: the client stopped sending (408).
        """
        size = len(self.start)
        write(self.start)
        while self.rest is not None and size <= _MAX_DISCARDED_BYTES:
            try:
                async with asyncio.timeout(_MAX_SILENCE_SECONDS):
                    part = await anext(self.rest, None)
            except TimeoutError as error:
                text = f"No byte of the body came for {_MAX_SILENCE_SECONDS:g} s; send it again."
                raise Rejected(408, text) from error
            if part is None:
                break
            size += len(part)
            if size <= limit:
                write(part)
        return size


async def receive_start(request: Request) -> Received:
    """Receive a small body, or the start of a large one."""
    parts: list[bytes] = []
    size = 0
    stream = request.stream()
    async for part in stream:
        parts.append(part)
        size += len(part)
        if size > INLINE_BYTES:
            return Received(b"".join(parts), stream)
    return Received(b"".join(parts), None)


async def read_message(request: Request) -> bytes:
    """Receive the body of a message and decompress it, keeping no more of it than the bound.

    Raises:
        BodyTooLarge: the body is larger than the bound.
        InvalidRequest: its encoding is unknown, or it is damaged.
        Rejected: there is no room for it (503), or it stopped arriving (408).
    """
    encoding = request.headers.get("content-encoding")
    received = await receive_start(request)
    plain = received.plain(encoding)
    if plain is not None:
        return plain
    parts: list[bytes] = []
    async with offload_of(request).budget.reserve(MAX_MESSAGE_BYTES):
        if await received.each(parts.append, MAX_MESSAGE_BYTES) > MAX_MESSAGE_BYTES:
            raise too_large(MAX_MESSAGE_BYTES)
        return await asyncio.to_thread(decompress, b"".join(parts), encoding, MAX_MESSAGE_BYTES)


async def parsed(request: Request, model: type[Body], body: bytes) -> Body:
    """Parse a message, a large one in a thread, one at a time.

    Raises:
        InvalidRequest: the message is invalid.
    """
    newer = client_of(request).is_newer
    if len(body) <= INLINE_BYTES:
        return parse(model, body, newer_client=newer)
    async with offload_of(request).parsing:
        return await asyncio.to_thread(parse, model, body, newer_client=newer)


@asynccontextmanager
async def offloaded(
    request: Request,
    received: Received,
    job: str,
    arguments: Mapping[str, Any],
    error_of: Callable[[bytes], Exception],
) -> AsyncIterator[tuple[dict[str, Any], Spool]]:
    """Receive a large body, compute a job of it in another process, and hold what it made of it.

    That stays outside of the interpreter's memory, and counts among the bodies that are held.

    Args:
        request: the request.
        received: the start of its body.
        job: the job's name.
        arguments: the job's.
        error_of: makes the error for a body over the limit from its first bytes.

    Yields:
        What the job found out, and its bytes.

    Raises:
        WireError: the job found the body invalid.
        Rejected: there is no room for the body (503), or it stopped arriving (408).
    """
    offload = offload_of(request)
    async with offload.budget.reserve(_size(request)):
        async with spooled() as body:
            if await received.each(body.write, MAX_BODY_BYTES) > MAX_BODY_BYTES:
                raise error_of(received.start)
            facts, result = await offload.run(job, arguments, body)
        try:
            if "error" in facts:
                raise_described(facts["error"])
            yield facts, result
        finally:
            await freed(result)


def _size(request: Request) -> int:
    """Return the most bytes that a body takes: what the client says, or the bound."""
    length = request.headers.get("content-length", "")
    known = length.isdecimal() and len(length) < 20
    return min(int(length), MAX_BODY_BYTES) if known else MAX_BODY_BYTES
