"""Which samples have ended: one poll for all samples of a client, instead of one a sample."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from everstep.ledger import Ledger, Operation
from everstep.ledger.samples import Completion
from everstep.runtime.errors import Rejected
from everstep.runtime.settings import Settings
from everstep.wire import types

CLIENT_PLACES = 1_000_000_000
"""So many sequence ids each client of a sampler has; the n-th to join begins at n times that."""
_MOST = 1000


class Completions:
    """Answers polls.

    Args:
        ledger: knows what has ended, in which order.
        settings: how long a poll is held.
    """

    def __init__(self, ledger: Ledger, settings: Settings) -> None:
        self._ledger = ledger
        self._settings = settings
        self._ends: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def note(self, operation: Operation) -> None:
        """Wake whoever waits for an end in the operation's sampler."""
        ended = self._ends.pop(operation.scope, None)
        if ended is not None:
            ended.set()

    async def retrieve(
        self, request: types.FuturesRetrieveRequest
    ) -> types.FuturesRetrieveResponse:
        """Drop the results that the client says it has, then wait for more to end.

        Raises:
            Rejected: there is no such sampler (404).
        """
        sampler_id, client = request.target.sampling_session_id, request.target.cloned_sampler_id
        if await self._ledger.sampler(sampler_id) is None:
            raise Rejected(404, f"Sampling session {sampler_id} does not exist.")
        places = range(client * CLIENT_PLACES, (client + 1) * CLIENT_PLACES)
        await self._ledger.samples.drop(sampler_id, places, request.retrieved_request_ids)
        longest = self._settings.poll_seconds
        seconds = longest if request.timeout is None else min(request.timeout, longest)
        found = await self._wait(sampler_id, places, request.prev_cursor, seconds)
        cursor = found[-1].number if found else request.prev_cursor
        completions = [_completion(each) for each in found]
        return types.FuturesRetrieveResponse(completions=completions, cursor=cursor)

    async def _wait(
        self, sampler_id: str, places: range, after: int, seconds: float
    ) -> list[Completion]:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while True:
            ended = self._ends.setdefault(sampler_id, asyncio.Event())
            found = await self._ledger.samples.completions(sampler_id, places, after, _MOST)
            left = until - loop.time()
            if found or left <= 0:
                return found
            try:
                await asyncio.wait_for(ended.wait(), left)
            except TimeoutError:
                return []


def _completion(ended: Completion) -> types.FutureCompletion:
    if ended.failed:
        return types.FutureFailed(request_id=ended.request_id)
    return types.FutureFinished(
        request_id=ended.request_id, response_payload_uncompressed_size=ended.size
    )
