"""Application: the FastAPI app with its routes, and the runtime for its lifetime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from everstep._version import __version__
from everstep.runtime import OperationFailed, Rejected, Runtime
from everstep.server.body import BodyRoute
from everstep.server.direct import DirectFastAPI, ExactPaths
from everstep.server.errors import add_error_handlers
from everstep.server.hosted_paths import HostedPaths
from everstep.server.offload.pool import Offload
from everstep.server.openai import router as openai_router
from everstep.server.openapi import DESCRIPTION, describe, errors
from everstep.server.requests import CurrentRuntime
from everstep.server.routes import (
    administration,
    checkpoints,
    downloads,
    everstep,
    futures,
    hub,
    sampling,
    sessions,
    tokenizers,
    training,
)
from everstep.server.stopping import Stopping
from everstep.wire import types

health = APIRouter(tags=["health"], route_class=BodyRoute)


@health.get("/healthz", responses=errors())
async def healthz(runtime: CurrentRuntime) -> types.HealthResponse:
    """Return 200 once requests will succeed."""
    if not runtime.ready:
        raise Rejected(503, "The worker is not ready; try again.")
    return types.HealthResponse()


_PREFIX = "/api/v1"
_API = (
    health,
    sessions.router,
    training.router,
    training.operations,
    sampling.router,
    futures.router,
    checkpoints.router,
    downloads.router,
    administration.router,
    everstep.router,
    tokenizers.router,
)


def create_app(
    open_runtime: Callable[[], Awaitable[Runtime]],
    on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Return the application. It answers at once, and requests for models wait until they load.

    Args:
        open_runtime: opens the runtime when the application starts.
        on_ready: called once all requests will succeed.
        on_failure: called when the home can't be opened or a model can't be loaded, so that
            requests will never succeed. Without it, the error of opening the home is raised.
    """

    async def notify(runtime: Runtime) -> None:
        try:
            await runtime.started()
        except OperationFailed as failure:
            if on_failure is not None:
                on_failure(failure)
        else:
            if on_ready is not None:
                on_ready()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            runtime = await open_runtime()
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(error)
            yield
            return
        app.state.runtime = runtime
        notifying = asyncio.create_task(notify(runtime))
        yield
        notifying.cancel()
        app.state.stopping.set()
        await runtime.close()
        app.state.offload.close()

    app = DirectFastAPI(
        title="Everstep", version=__version__, description=DESCRIPTION, lifespan=lifespan
    )
    app.state.stopping = Stopping()
    app.state.offload = Offload()
    add_error_handlers(app)
    app.include_router(health)
    app.include_router(hub.router)
    for router in _API:
        app.include_router(router, prefix=_PREFIX)
    app.include_router(openai_router)
    app.exact = ExactPaths(_direct_routes())
    app.router.routes.insert(0, app.exact)
    describe(app)
    app.add_middleware(HostedPaths)
    return app


def _direct_routes() -> Iterator[tuple[str, APIRoute]]:
    for router in _API:
        yield from ((_PREFIX, route) for route in router.routes if isinstance(route, APIRoute))
