"""``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``.

Errors are in OpenAI's form. The API key comes as a bearer token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from everstep.runtime import OperationFailed, Rejected
from everstep.runtime.sampling.openai import TextCompletions
from everstep.server.body import BodyRoute
from everstep.server.direct import Handler
from everstep.server.errors import CLIENT_CLOSED, OPENAI_PREFIX
from everstep.server.openai import models
from everstep.server.openai.execute import ClientGone, accept, answer, chunks, status_of
from everstep.server.openai.plan import Plan, plan_chat, plan_text
from everstep.server.openai.responses import ChatForm, Form, TextForm
from everstep.server.openapi import errors
from everstep.server.requests import CurrentRuntime, runtime_of
from everstep.wire.messages.openai import (
    ChatCompletionRequest,
    CompletionErrorResponse,
    CompletionRequest,
)


class _Route(BodyRoute):
    """A route whose failed samples have an HTTP status."""

    def get_route_handler(self) -> Handler:  # type: ignore[override]  # a coroutine is awaitable
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except OperationFailed as failure:
                raise Rejected(status_of(failure), failure.message) from failure

        return handle


async def _completions(runtime: CurrentRuntime) -> TextCompletions:
    """Wait until the models are loaded. Raises `Rejected` (503) if they can't be."""
    await runtime.loaded()
    return runtime.text_completions


async def _bearer_token(request: Request) -> str | None:
    """Return the API key, which may be a weights access token."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else None


_errors = partial(errors, model=CompletionErrorResponse)
router = APIRouter(prefix=OPENAI_PREFIX, tags=["openai"], route_class=_Route)
Completions = Annotated[TextCompletions, Depends(_completions)]
BearerToken = Annotated[str | None, Depends(_bearer_token)]


@router.get("/models", responses=_errors())
async def list_models(runtime: CurrentRuntime) -> models.ModelList:
    """List the base models and every checkpoint that can be sampled from."""
    return await models.list_models(runtime)


@router.get("/models/{model:path}", responses=_errors(404))
async def get_model(runtime: CurrentRuntime, model: str) -> models.Model:
    """Return a base model or a checkpoint."""
    return await models.get_model(runtime, model)


@router.post("/completions", responses=_errors(400, 404, 413, 429), response_model=None)
async def complete(
    request: Request, message: CompletionRequest, completions: Completions, token: BearerToken
) -> Response:
    """Continue a text, with ``stream`` as server-sent events."""
    return await _answer(request, await plan_text(completions, message, token), TextForm)


@router.post("/chat/completions", responses=_errors(400, 404, 413, 429), response_model=None)
async def complete_chat(
    request: Request, message: ChatCompletionRequest, completions: Completions, token: BearerToken
) -> Response:
    """Answer a conversation by the model's chat template, with ``stream`` as events."""
    return await _answer(request, await plan_chat(completions, message, token), ChatForm)


@router.post("/responses", responses=_errors(404), response_model=None)
async def respond() -> Response:
    """Say that the Responses API is not served."""
    raise Rejected(
        404,
        "The Responses API is not served: it stores conversations and runs tools, which this "
        "service does not. Use chat completions (client.chat.completions.create) with all "
        "messages in each request.",
    )


async def _answer(request: Request, plan: Plan, form_of: Callable[[str, str], Form]) -> Response:
    runtime = runtime_of(request)
    request_ids = await accept(runtime, request, plan)
    form = form_of(request_ids[0], plan.request.model)
    if plan.request.stream:
        return StreamingResponse(
            chunks(runtime, request, plan, form, request_ids),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )
    try:
        return JSONResponse(await answer(runtime, request, plan, form, request_ids))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED)
