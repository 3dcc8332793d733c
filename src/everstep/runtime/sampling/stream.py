"""Sample streams: pass a sample's tokens to its readers as they are drawn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from everstep.ledger import Operation
from everstep.wire.codecs.proto import decode_sample_response
from everstep.wire.messages.streams import DrawnTokens, drawn_since

SampleEvent = DrawnTokens | Operation
"""The tokens of one position, or last the finished operation."""


class StreamReader:
    """One reader of a sample.

    Args:
        position: the first position that it reads.

    Attributes:
        position: the next position that it reads.
    """

    def __init__(self, position: int) -> None:
        self.position = position
        self._events: asyncio.Queue[SampleEvent | None] = asyncio.Queue()

    def add(self, drawn: Iterable[DrawnTokens]) -> None:
        """Add tokens that were drawn. Positions that it has read are skipped."""
        for each in drawn:
            self._events.put_nowait(each)

    def end(self, operation: Operation | None) -> None:
        """Add the finished operation, or None when the service stops before it is finished."""
        self._events.put_nowait(operation)

    async def events(self) -> AsyncIterator[SampleEvent]:
        """Yield each position once, in order, then the finished operation."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, DrawnTokens):
                if event.position == self.position:
                    self.position += 1
                    yield event
                continue
            for drawn in _tokens_of(event, self.position):
                yield drawn
            yield event
            return


def _tokens_of(operation: Operation, position: int) -> list[DrawnTokens]:
    """Return the tokens of a finished sample from a position on."""
    if operation.status != "succeeded" or not operation.result:
        return []
    response = decode_sample_response(operation.result)
    sequences = [(s.tokens, s.logprobs or [], s.topk_logprobs) for s in response.sequences]
    return drawn_since(position, sequences)
