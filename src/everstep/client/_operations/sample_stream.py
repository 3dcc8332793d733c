"""Sample streams: read tokens as they are drawn, through lost connections and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Self

from everstep.addresses import route
from everstep.backoff import Backoff
from everstep.client._transport.errors import (
    APIConnectionError,
    APIResponseValidationError,
    APIStatusError,
)
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.futures import submit as run
from everstep.client._transport.http import RETRIED, Http
from everstep.wire import types

if TYPE_CHECKING:
    from everstep.wire.messages.streams import DrawnToken, DrawnTokens

_SILENCE_SECONDS = 45.0
"""The service sends a keep-alive every 15 s."""
_BACKOFF = Backoff(initial=0.25, max=10.0)


class SampleStream:
    """The tokens of a sample, one after another, in ``for`` or ``async for``.

    Of several sequences, the tokens of one position come together, then those of the next.
    """

    def __init__(self) -> None:
        self._drawn: asyncio.Queue[DrawnToken | None] = asyncio.Queue()
        self._position = 0
        self._seen: dict[tuple[int, int], int] = {}
        self._response: APIFuture[types.SampleResponse] | None = None

    def begin(self, work: Coroutine[Any, Any, types.SampleResponse]) -> None:
        """Start the coroutine that fills the stream and returns its result."""

        async def ending() -> types.SampleResponse:
            try:
                return await work
            finally:
                self._drawn.put_nowait(None)

        self._response = APIFuture.of(ending())

    def result(self, timeout: float | None = None) -> types.SampleResponse:
        """Wait for the response that `SamplingClient.sample` would have returned, with all tokens.

        Raises:
            TimeoutError: the timeout expired. The sample continues.
            RequestFailedError: the sample failed. The message says why.
        """
        return self._future().result(timeout)

    async def result_async(self, timeout: float | None = None) -> types.SampleResponse:  # noqa: ASYNC109
        """`result`, in a coroutine."""
        return await self._future().result_async(timeout)

    def cancel(self) -> None:
        """Cancel the sample: the service stops it, and the stream ends."""
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
        """Return the next token, or None at the end. Raises the sample's error if it failed."""
        token = await self._drawn.get()
        if token is None:
            self._drawn.put_nowait(None)  # for the next call
            future = self._future().future()
            if not future.cancelled():
                await asyncio.wrap_future(future)
        return token

    # Filled on the client's event loop

    async def follow(self, http: Http, request_id: str) -> None:
        """Receive tokens until the sample has ended or can't be streamed."""
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
                    return  # not streamable: the future holds the reason, or all tokens
            failures = 0 if self._position > before else failures + 1
            await http.wait(_BACKOFF.delay(failures))

    async def _read(self, http: Http, request_id: str) -> bool:
        """Read one connection to its end. Returns whether the sample has ended."""
        from everstep.wire.messages.streams import DrawnTokens

        path = route("everstep", "samples", request_id, "events")
        position = {"position": self._position}
        async with http.events(path, position, _SILENCE_SECONDS) as events:
            async for event in events:
                if event.event != "drawn":
                    return True
                self._add(DrawnTokens.model_validate_json(event.data))
        return False

    def complete(self, response: types.SampleResponse) -> None:
        """Add the tokens that the stream lacks from the response.

        Raises:
            APIResponseValidationError: the response has other tokens than were streamed.
        """
        from everstep.wire.messages.streams import drawn_since

        for (sequence, position), token in self._seen.items():
            tokens = response.sequences[sequence].tokens
            if tokens[position : position + 1] != [token]:
                raise APIResponseValidationError(
                    f"Token {position} of sequence {sequence} was streamed as {token}, but the "
                    "result holds another: the service did not reproduce the same tokens."
                )
        sequences = [(s.tokens, s.logprobs or [], s.topk_logprobs) for s in response.sequences]
        for drawn in drawn_since(self._position, sequences):
            self._add(drawn)

    def _add(self, drawn: DrawnTokens) -> None:
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
            raise RuntimeError("the stream has not begun")
        return self._response
