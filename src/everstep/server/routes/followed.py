"""Operations whose acceptance is followed by their result, for clients that accept that.

See `everstep.wire.codecs.followed`.
"""

from __future__ import annotations

import json

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from everstep.runtime import Rejected
from everstep.server.body import OperationRoute
from everstep.server.client_info import client_of
from everstep.server.direct import Handler
from everstep.server.requests import runtime_of, stopping_of
from everstep.server.routes.futures import result_response
from everstep.wire import types
from everstep.wire.codecs.followed import FOLLOWED, accepted_part, result_part


class FollowedRoute(OperationRoute):
    """A route of an operation that follows it to its end where the client asks for that."""

    def get_route_handler(self) -> Handler:  # type: ignore[override]  # a coroutine is awaitable
        """Return the handler, which keeps the response of such a client open."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            accepted = await handler(request)
            follows = accepted.status_code == 200 and FOLLOWED in request.headers.get("accept", "")
            return _Followed(request, bytes(accepted.body)) if follows else accepted

        return handle


class _Followed(Response):
    """The acceptance of an operation, and its result."""

    media_type = FOLLOWED

    def __init__(self, request: Request, accepted: bytes) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})  # a proxy must not hold it back
        del self.headers["content-length"]
        self._request = request
        self._accepted = accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send both parts."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        first = {"type": "http.response.body", "body": accepted_part(self._accepted)}
        await send(start)
        await send({**first, "more_body": True})
        await send({"type": "http.response.body", "body": await self._result()})

    async def _result(self) -> bytes:
        """Wait for the result. Empty: the client has to poll."""
        request = self._request
        poll = types.FutureRetrieveRequest(
            request_id=json.loads(self._accepted)["request_id"], allow_metadata_only=True
        )
        try:
            response = await result_response(
                request, poll, runtime_of(request), client_of(request), stopping_of(request)
            )
        except Rejected:
            return b""
        media_type = response.headers["content-type"]
        body = bytes(response.body)
        return b"" if response.status_code != 200 else result_part(media_type, body)
