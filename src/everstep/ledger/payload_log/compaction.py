"""Compaction: moves what is left in a segment behind newer contents, so that it can be dropped.

Rows keep a segment as long as they name one content in it. A segment of which they name less than
half is copied: to the active segment of the contents' stream, durable before any row names a copy.
So segments that take no more contents are at most twice as large as what rows name in them, and
fewer bytes are copied than are freed. What is damaged is not moved, and keeps its segment.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from everstep.failpoints import Failpoint
from everstep.ledger import tables as t
from everstep.ledger.errors import LedgerError
from everstep.ledger.payload_log.content import Column, location_columns, location_of
from everstep.ledger.payload_log.log import Location, PayloadLog, PayloadUnreadable, Stream
from everstep.ledger.payload_log.records import HEADER_BYTES
from everstep.ledger.sqlite import row_checksums
from everstep.ledger.store import Store
from everstep.logs import get_logger

_log = get_logger("everstep.ledger")
_COPIED = Failpoint("ledger.compaction.copied", "contents are copied, no row names the copies")
_MOVED = Failpoint("ledger.compaction.moved", "rows name the copies, the segment is still there")
_MIN_LIVE = 0.5
_ROWS_AT_ONCE = 200
_STREAMS: dict[Column, Stream] = {"payload": "requests", "result": "results"}
_Result = TypeVar("_Result")
_Named = tuple[str, Location]
"""A request id, and the location that its row keeps."""


async def compact(
    store: Store,
    log: PayloadLog,
    segment: int,
    in_thread: Callable[[Callable[[], list[Location]]], Awaitable[list[Location]]],
) -> bool:
    """Move what rows name in a segment, if that is less than half of it.

    Args:
        store: the database.
        log: the payload log.
        segment: one that takes no more contents.
        in_thread: runs a function that blocks.

    Returns:
        Whether rows were moved, so that the segment may be dropped.
    """
    try:
        named = {name: await store.read(partial(_named, segment, name)) for name in _STREAMS}
        live = sum(at.size + HEADER_BYTES for each in named.values() for _, at in each)
        if live >= _MIN_LIVE * log.size(segment):
            return False
        for name, contents in named.items():
            if contents:
                locations = [at for _, at in contents]
                copies = await in_thread(partial(log.copy, locations, _STREAMS[name]))
                _COPIED()
                await _move(store, log, name, list(zip(contents, copies, strict=True)))
                _MOVED()
    except (OSError, PayloadUnreadable, LedgerError) as error:
        _log.error("a payload segment can't be compacted", segment=segment, reason=str(error))
        return False
    return True


def _named(segment: int, name: Column, connection: Connection) -> list[_Named]:
    """Return the contents of a segment that rows name as their payload or their result.

    Raises:
        LedgerDamaged: the checksum of one of these rows does not match.
    """
    columns = t.operations.c
    found = []
    query = row_checksums.without_contents(t.operations).where(
        columns[f"{name}_segment"] == segment
    )
    for row in connection.execute(query).all():
        row_checksums.check(t.operations, row)
        at = location_of(dict(row._mapping), name)
        assert at is not None
        found.append((row.request_id, at))
    return found


async def _move(
    store: Store,
    log: PayloadLog,
    name: Column,
    moves: Sequence[tuple[_Named, Location]],
) -> None:
    """Have rows name the copies, those that still name the originals."""
    columns = t.operations.c

    def work(connection: Connection, part: Sequence[tuple[_Named, Location]]) -> None:
        for (request_id, at), copy in part:
            mine = columns.request_id == request_id
            here = columns[f"{name}_segment"] == at.segment, columns[f"{name}_offset"] == at.offset
            row_checksums.touch(
                connection, t.operations, mine, *here, **location_columns(name, copy)
            )

    try:
        for begin in range(0, len(moves), _ROWS_AT_ONCE):  # other calls wait for the thread
            await store.run(partial(work, part=moves[begin : begin + _ROWS_AT_ONCE]))
    finally:
        for _, copy in moves:
            log.settle(copy)
