"""Batch polls: one poll for all samples of a client, instead of one per sample."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from everstep.ledger import Operation
from everstep.ledger.samples import Completion
from everstep.runtime.absence import absent
from everstep.runtime.context import RuntimeContext
from everstep.wire import types

CLIENT_SEQ_IDS = 1_000_000_000
"""Sequence ids per client of a sampler. The n-th client to join begins at n times this number."""
MAX_COMPLETIONS = 1000


class BatchPoll:
    """Answers batch polls.

    Args:
        context: of the service.
    """

    def __init__(self, context: RuntimeContext) -> None:
        self._ledger = context.ledger
        self._settings = context.settings
        self._ends: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def notify(self, operation: Operation) -> None:
        """Wake the polls of a finished operation's sampler."""
        ended = self._ends.pop(operation.scope, None)
        if ended is not None:
            ended.set()

    async def retrieve(
        self, request: types.FuturesRetrieveRequest
    ) -> types.FuturesRetrieveResponse:
        """Drop the results that the client acknowledges, then wait for more samples to finish.

        Raises:
            Rejected: the sampler does not exist (404).
        """
        sampler_id, client = request.target.sampling_session_id, request.target.cloned_sampler_id
        if await self._ledger.sampler(sampler_id) is None:
            text = f"Sampling session {sampler_id} does not exist."
            raise await absent(self._ledger, sampler_id, text)
        seq_ids = range(client * CLIENT_SEQ_IDS, (client + 1) * CLIENT_SEQ_IDS)
        await self._ledger.samples.drop_results(sampler_id, seq_ids, request.retrieved_request_ids)
        limit = self._settings.poll_seconds
        seconds = limit if request.timeout is None else min(request.timeout, limit)
        found = await self._wait(sampler_id, seq_ids, request.prev_cursor, seconds)
        cursor = found[-1].number if found else request.prev_cursor
        completions = [_completion(each) for each in found]
        return types.FuturesRetrieveResponse(completions=completions, cursor=cursor)

    async def _wait(
        self, sampler_id: str, seq_ids: range, after: int, seconds: float
    ) -> list[Completion]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            ended = self._ends.setdefault(sampler_id, asyncio.Event())
            found = await self._ledger.samples.completions(
                sampler_id, seq_ids, after, MAX_COMPLETIONS
            )
            remaining = deadline - loop.time()
            if found or remaining <= 0:
                return found
            try:
                await asyncio.wait_for(ended.wait(), remaining)
            except TimeoutError:
                return []


def _completion(ended: Completion) -> types.FutureCompletion:
    if ended.failed:
        return types.FutureFailed(request_id=ended.request_id)
    return types.FutureFinished(
        request_id=ended.request_id, response_payload_uncompressed_size=ended.size
    )
