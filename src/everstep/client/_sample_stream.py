"""Reading a sample along as it is drawn, through lost connections and restarts of the service."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Self

from everstep.client._errors import (
    APIConnectionError,
    APIResponseValidationError,
    APIStatusError,
)
from everstep.client._futures import APIFuture
from everstep.client._futures import submit as run
from everstep.client._http import RETRIED, Http
from everstep.wire import types
from everstep.wire.streams import DrawnToken, DrawnTokens, drawn_since

_SILENCE_SECONDS = 45.0
"""The service says every 15 s that it is there."""
_FIRST_DELAY = 0.25
_LONGEST_DELAY = 10.0


class SampleStream:
    """The tokens of a sample, one after another, in ``for`` or ``async for``.

    Of several sequences those of one position come together, then those of the next.
    """

    def __init__(self) -> None:
        self._drawn: asyncio.Queue[DrawnToken | None] = asyncio.Queue()
        self._position = 0
        self._seen: dict[tuple[int, int], int] = {}
        self._response: APIFuture[types.SampleResponse] | None = None

    def begin(self, work: Coroutine[Any, Any, types.SampleResponse]) -> None:
        """Start what fills the stream, and gives its result."""

        async def ending() -> types.SampleResponse:
            try:
                return await work
            finally:
                self._drawn.put_nowait(None)

        self._response = APIFuture.of(ending())

    def result(self, timeout: float | None = None) -> types.SampleResponse:
        """What `SamplingClient.sample` would have given, with all tokens; waits for it.

        Raises:
            TimeoutError: it took longer; the sample goes on.
            RequestFailedError: the sample failed; the text says why.
        """
        return self._future().result(timeout)

    async def result_async(self, timeout: float | None = None) -> types.SampleResponse:  # noqa: ASYNC109
        """`result`, in a coroutine."""
        return await self._future().result_async(timeout)

    def cancel(self) -> None:
        """Give the rest up: the service stops the sample, and the stream ends."""
        self._future().future().cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DrawnToken:
        token = run(self._next()).result()
        if token is None:
            raise StopIteration
        return token

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> DrawnToken:
        token = await asyncio.wrap_future(run(self._next()))
        if token is None:
            raise StopAsyncIteration
        return token

    async def _next(self) -> DrawnToken | None:
        """The next token; None: there are no more. Raises why the sample failed."""
        token = await self._drawn.get()
        if token is None:
            self._drawn.put_nowait(None)  # for whoever asks again
            future = self._future().future()
            if not future.cancelled():
                await asyncio.wrap_future(future)
        return token

    # Filling it, on the client's loop

    async def follow(self, http: Http, request_id: str) -> None:
        """Take tokens as they come, until the sample has ended or can't be followed."""
        failures = 0
        while True:
            before = self._position
            try:
                if await self._read(http, request_id):
                    return
            except APIConnectionError:
                pass
            except APIStatusError as error:
                if error.status_code not in RETRIED and error.status_code < 500:
                    return  # it can't be streamed; the future says why, or has all of it
            failures = 0 if self._position > before else min(failures + 1, 10)
            await http.wait(min(_FIRST_DELAY * 2.0**failures, _LONGEST_DELAY))

    async def _read(self, http: Http, request_id: str) -> bool:
        """Read one connection to its end; returns whether the sample has ended, too."""
        path = f"/everstep/samples/{request_id}/events"
        position = {"position": self._position}
        async with http.events(path, position, _SILENCE_SECONDS) as events:
            async for event in events:
                if event.event != "drawn":
                    return True
                self._take(DrawnTokens.model_validate_json(event.data))
        return False

    def complete(self, response: types.SampleResponse) -> None:
        """Take what a stream lacks from the result.

        Raises:
            APIResponseValidationError: the result has other tokens than were streamed.
        """
        for (sequence, position), token in self._seen.items():
            tokens = response.sequences[sequence].tokens
            if tokens[position : position + 1] != [token]:
                raise APIResponseValidationError(
                    f"Token {position} of sequence {sequence} was streamed as {token}, and the "
                    "result holds another: the service did not draw the same tokens again."
                )
        sequences = [(s.tokens, s.logprobs or [], s.topk_logprobs) for s in response.sequences]
        for drawn in drawn_since(self._position, sequences):
            self._take(drawn)

    def _take(self, drawn: DrawnTokens) -> None:
        if drawn.position != self._position:
            raise APIResponseValidationError(
                f"The stream holds position {drawn.position} where {self._position} is next."
            )
        self._position += 1
        for token in drawn.tokens:
            self._seen[token.sequence, token.position] = token.token
            self._drawn.put_nowait(token)

    def _future(self) -> APIFuture[types.SampleResponse]:
        if self._response is None:
            raise RuntimeError("the stream was not begun")
        return self._response
