"""``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``.

Errors are in OpenAI's form. The API key comes as a bearer token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute

from everstep.ledger import NotWritten
from everstep.runtime import OperationFailed, Rejected
from everstep.runtime.text_completions import TextCompletions
from everstep.server.common import body_of, refusal, retry_headers, runtime_of
from everstep.server.openai import models
from everstep.server.openai.answers import ChatForm, Form, TextForm, error_body
from everstep.server.openai.carrying_out import ClientGone, accept, answer, chunks, status_of
from everstep.server.openai.plan import Plan, plan_chat, plan_text
from everstep.server.openapi import errors, takes
from everstep.vault import StoreFailed
from everstep.wire.base import parse
from everstep.wire.errors import WireError
from everstep.wire.openai import (
    ChatCompletionRequest,
    CompletionErrorResponse,
    CompletionRequest,
)

_CLIENT_CLOSED = 499


class _Route(APIRoute):
    """A route whose errors are in OpenAI's form."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                return await handler(request)
            except (Rejected, WireError, StoreFailed) as error:
                return _error(*refusal(error))
            except OperationFailed as failure:
                return _error(status_of(failure), failure.message)
            except NotWritten:
                return _error(503, "The service could not write to its disk.")

        return told


_errors = partial(errors, model=CompletionErrorResponse)
router = APIRouter(prefix="/v1", tags=["openai"], route_class=_Route)


@router.get("/models", responses=_errors())
async def list_models(request: Request) -> models.ModelList:
    """The base models, and every checkpoint that can be sampled from."""
    return await models.listed(runtime_of(request))


@router.get("/models/{model:path}", responses=_errors(404))
async def get_model(request: Request, model: str) -> models.Model:
    """One of them."""
    return await models.one(runtime_of(request), model)


@router.post(
    "/completions",
    openapi_extra=takes(CompletionRequest),
    responses=_errors(400, 404, 413, 429),
    response_model=None,
)
async def complete(request: Request) -> Response:
    """Continue a text. With ``stream`` as server-sent events."""
    message = parse(CompletionRequest, await body_of(request))
    plan = await plan_text(await _completions(request), message, _token(request))
    return await _answer(request, plan, TextForm)


@router.post(
    "/chat/completions",
    openapi_extra=takes(ChatCompletionRequest),
    responses=_errors(400, 404, 413, 429),
    response_model=None,
)
async def complete_chat(request: Request) -> Response:
    """Answer a conversation, by the model's chat template. With ``stream`` as events."""
    message = parse(ChatCompletionRequest, await body_of(request))
    plan = await plan_chat(await _completions(request), message, _token(request))
    return await _answer(request, plan, ChatForm)


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
        return Response(status_code=_CLIENT_CLOSED)


async def _completions(request: Request) -> TextCompletions:
    """What completes texts, once the models are loaded; raises `Rejected` (503) if they can't."""
    runtime = runtime_of(request)
    await runtime.loaded()
    return runtime.text_completions


def _token(request: Request) -> str | None:
    """The key, which may be a weights access token."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else None


def _error(status: int, message: str, retry_after: float | None = None) -> Response:
    headers = retry_headers(status, retry_after)
    return JSONResponse(error_body(status, message), status_code=status, headers=headers)
