"""Dependencies of routes: the runtime, the stop of the service, weights access tokens."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import Depends, Request

from everstep.runtime import Rejected, Runtime
from everstep.runtime.authorization import TOKEN_PREFIX
from everstep.server.offload.pool import Offload
from everstep.server.stopping import Stopping


def runtime_of(request: Request) -> Runtime:
    """Return the runtime, or raise `Rejected` (503) while there is none."""
    runtime: Runtime | None = getattr(request.app.state, "runtime", None)
    if runtime is None:
        raise Rejected(503, "The service is starting; try again.")
    return runtime


def stopping_of(request: Request) -> Stopping:
    """Return the event that is set when the service begins to stop."""
    event: Stopping = request.app.state.stopping
    return event


def offload_of(request: Request) -> Offload:
    """Return what computes large bodies and results."""
    offload: Offload = request.app.state.offload
    return offload


def held_until_answered(request: Request) -> AsyncExitStack:
    """Return what is closed once the handler of an operation's route has answered a request."""
    held = getattr(request.state, "held", None)
    if held is None:
        held = request.state.held = AsyncExitStack()
    return held


async def close_held(request: Request) -> None:
    """Close what `held_until_answered` holds."""
    held: AsyncExitStack | None = getattr(request.state, "held", None)
    if held is not None:
        await held.aclose()


def weights_token_of(request: Request) -> str | None:
    """Return the weights access token from a request's headers, if any.

    SDKs before 0.26 send it as the API key when they ask for a checkpoint's details.
    """
    token = request.headers.get("x-tinker-weights-access-token")
    key = request.headers.get("x-api-key")
    return token or (key if key is not None and key.startswith(TOKEN_PREFIX) else None)


def no_future(request_id: str) -> Rejected:
    """Build the refusal (404) of a request for a future that is not there."""
    return Rejected(
        404,
        f"There is no future {request_id} here: this service has not accepted it, or it was "
        "deleted with its run or session.",
    )


async def _runtime(request: Request) -> Runtime:
    return runtime_of(request)


async def _stopping(request: Request) -> Stopping:
    return stopping_of(request)


async def _weights_token(request: Request) -> str | None:
    return weights_token_of(request)


# Asynchronous: FastAPI calls any other function in a thread.
CurrentRuntime = Annotated[Runtime, Depends(_runtime)]
CurrentStopping = Annotated[Stopping, Depends(_stopping)]
WeightsToken = Annotated[str | None, Depends(_weights_token)]
