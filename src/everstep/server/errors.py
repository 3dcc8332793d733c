"""Errors: exceptions of the service as JSON answers with their statuses and retry headers.

An error under ``/v1`` has OpenAI's form, wherever it was raised: clients of that API read no other.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from everstep.json_values import encodable
from everstep.ledger import Deleted, LedgerDamaged, NotWritten, QueueFull
from everstep.logs import get_logger
from everstep.runtime import Rejected
from everstep.server.client_info import client_of
from everstep.vault import StoreFailed
from everstep.wire.errors import BodyTooLarge, WireError
from everstep.wire.messages.openai import CompletionError, CompletionErrorResponse

_log = get_logger("everstep.server")
UNEXPECTED = "The service failed to answer this; its log says why."
OPENAI_PREFIX = "/v1"
CLIENT_CLOSED = 499
"""The usual status, in logs, of a request whose client is gone."""
_QUEUE_RETRY_SECONDS = 5.0


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error as ``{"detail": …}``, or in OpenAI's form, with its status."""

    @app.exception_handler(Rejected)
    async def rejected(request: Request, error: Rejected) -> JSONResponse:
        return _error(request, *status_and_text(error))

    @app.exception_handler(WireError)
    async def wire_error(request: Request, error: WireError) -> JSONResponse:
        return _error(request, *status_and_text(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors()
        )
        return _error(request, 400, problems)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _error(request, error.status_code, str(error.detail))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED)  # to nobody, but for traces

    @app.exception_handler(Exception)  # the server logs it as well
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return _error(request, 500, UNEXPECTED)

    @app.exception_handler(LedgerDamaged)
    async def damaged(request: Request, error: LedgerDamaged) -> JSONResponse:
        _log.error("ledger damaged", reason=str(error))
        return _error(request, 500, str(error))

    @app.exception_handler(Deleted)
    async def deleted(request: Request, error: Deleted) -> JSONResponse:
        return _error(request, 404, str(error))

    @app.exception_handler(QueueFull)
    async def queue_full(request: Request, error: QueueFull) -> JSONResponse:
        return _error(request, 429, str(error), _QUEUE_RETRY_SECONDS)

    @app.exception_handler(StoreFailed)
    async def unreachable(request: Request, error: StoreFailed) -> JSONResponse:
        return _error(request, *status_and_text(error))

    @app.exception_handler(NotWritten)
    async def not_written(request: Request, error: NotWritten) -> JSONResponse:
        _log.error("ledger not written", reason=str(error))
        return _error(
            request, 503, "The service could not write to its disk; nothing was accepted."
        )


def status_and_text(error: Rejected | WireError | StoreFailed) -> tuple[int, str, float | None]:
    """Return an error's status and text, and the seconds after which to retry, if known."""
    if isinstance(error, Rejected):
        return error.status, error.detail, error.retry_after
    if isinstance(error, StoreFailed):
        _log.error("vault storage failed", reason=str(error))
        return 503, f"The service can't reach its vault; try again. {error}", None
    return 413 if isinstance(error, BodyTooLarge) else 400, str(error), None


def openai_error(status: int, message: str) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    error = CompletionError(
        message=message,
        type="invalid_request_error" if status < 500 else "server_error",
        code={404: "model_not_found", 429: "rate_limit_exceeded"}.get(status),
    )
    return CompletionErrorResponse(error=error).model_dump(mode="json")


def _error(
    request: Request, status: int, detail: str, retry_after: float | None = None
) -> JSONResponse:
    detail = encodable(detail)
    content: dict[str, Any] = {"detail": detail}
    if f"{request.url.path}/".startswith(f"{OPENAI_PREFIX}/"):
        content = openai_error(status, detail)
    elif client_of(request).reads_message_field:
        content["message"] = detail
    headers = retry_headers(status, retry_after)
    return JSONResponse(content, status_code=status, headers=headers)


def retry_headers(status: int, retry_after: float | None) -> dict[str, str]:
    """Return the headers in which SDKs read when to retry, or none where a retry won't help."""
    headers = {}
    if retry_after is not None:
        headers["retry-after-ms"] = str(round(retry_after * 1000))
    if status == 503 or retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after or 1))
    return headers
