"""Following a sample: its tokens as they are drawn, for whoever reads along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from everstep.ledger import Operation
from everstep.wire.proto import decode_sample_response
from everstep.wire.streams import DrawnTokens, drawn_since

SampleEvent = DrawnTokens | Operation
"""What was drawn at a position; or, last, the finished operation."""


class Follower:
    """One reader of a sample.

    Args:
        position: what it wants to read first.

    Attributes:
        position: what it reads next.
    """

    def __init__(self, position: int) -> None:
        self.position = position
        self._events: asyncio.Queue[SampleEvent | None] = asyncio.Queue()

    def drawn(self, drawn: Iterable[DrawnTokens]) -> None:
        """Take what was drawn; what it has read before is skipped."""
        for each in drawn:
            self._events.put_nowait(each)

    def end(self, operation: Operation | None) -> None:
        """Take the sample's end; None: the service stops, and the sample goes on later."""
        self._events.put_nowait(operation)

    async def events(self) -> AsyncIterator[SampleEvent]:
        """Each position once, in order, then the finished operation."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, DrawnTokens):
                if event.position == self.position:
                    self.position += 1
                    yield event
                continue
            for drawn in _drawn_by(event, self.position):
                yield drawn
            yield event
            return


def _drawn_by(operation: Operation, position: int) -> list[DrawnTokens]:
    """What a finished sample's result holds from a position on."""
    if operation.status != "succeeded" or not operation.result:
        return []
    response = decode_sample_response(operation.result)
    sequences = [(s.tokens, s.logprobs or [], s.topk_logprobs) for s in response.sequences]
    return drawn_since(position, sequences)
