"""The application: routes under /api/v1, the runtime for its lifetime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request

from everstep.runtime import OperationFailed, Rejected, Runtime
from everstep.server import (
    routes_administration,
    routes_checkpoints,
    routes_downloads,
    routes_everstep,
    routes_futures,
    routes_hub,
    routes_sampling,
    routes_sessions,
    routes_tokenizers,
    routes_training,
)
from everstep.server.common import add_error_handlers, runtime_of
from everstep.server.openai import router as openai_router
from everstep.server.openapi import DESCRIPTION, describe, errors
from everstep.wire import types


def create_app(
    open_runtime: Callable[[], Awaitable[Runtime]],
    on_ready: Callable[[], None] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Return the application. It answers at once; what needs a model waits until it is loaded.

    Args:
        open_runtime: opens the runtime when the application starts.
        on_ready: called once all requests will succeed.
        on_failure: called when the home can't be opened or a model can't be loaded: they never
            will. Without it, a home that can't be opened is raised.
    """

    async def tell(runtime: Runtime) -> None:
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
        telling = asyncio.create_task(tell(runtime))
        yield
        telling.cancel()
        app.state.stopping.set()
        await runtime.close()

    app = FastAPI(
        title="Everstep", version=version("everstep"), description=DESCRIPTION, lifespan=lifespan
    )
    app.state.stopping = asyncio.Event()
    add_error_handlers(app)
    health = APIRouter(tags=["health"])

    @health.get("/healthz", responses=errors())
    async def healthz(request: Request) -> types.HealthResponse:
        """Well only when requests will succeed."""
        if not runtime_of(request).ready:
            raise Rejected(503, "The worker is not ready; try again.")
        return types.HealthResponse()

    app.include_router(health)
    app.include_router(routes_hub.router)
    for router in (
        health,
        routes_sessions.router,
        routes_training.router,
        routes_sampling.router,
        routes_futures.router,
        routes_checkpoints.router,
        routes_downloads.router,
        routes_administration.router,
        routes_everstep.router,
        routes_tokenizers.router,
    ):
        app.include_router(router, prefix="/api/v1")
    app.include_router(openai_router)
    describe(app)
    return app
