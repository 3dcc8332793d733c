"""What routes share: the runtime, the body within its bound, and errors as JSON."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Collection
from ipaddress import ip_address
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from everstep.ledger import LedgerDamaged, NotWritten
from everstep.runtime import Rejected, Runtime
from everstep.runtime.access import TOKEN_PREFIX
from everstep.vault import StoreFailed
from everstep.wire.body import decompress, head, too_large
from everstep.wire.errors import BodyTooLarge, WireError
from everstep.wire.paths import CheckpointKind

_log = structlog.get_logger("everstep.server")
MAX_BODY_BYTES = 64 << 20
_MAX_DROPPED_BYTES = 1 << 30
_HEAD_BYTES = 1024
_RELEASE = re.compile(r"(\d+)\.(\d+)")
_FIRST_WITH_EXTERNAL = (0, 28)


def runtime_of(request: Request) -> Runtime:
    """The runtime; raises `Rejected` (503) while there is none."""
    runtime: Runtime | None = getattr(request.app.state, "runtime", None)
    if runtime is None:
        raise Rejected(503, "The service is starting; try again.")
    return runtime


def stopping_of(request: Request) -> asyncio.Event:
    """Set when the service begins to stop."""
    event: asyncio.Event = request.app.state.stopping
    return event


def is_tinkex(request: Request) -> bool:
    """Whether the client is Tinkex, of Elixir.

    It sends a run's operations one after the other, burns sequence ids that it never sends, and
    can't read a failed future's usual form (docs/guides/tinkex.md).
    """
    return request.headers.get("user-agent", "").lower().startswith("asynctinkex")


def is_near(request: Request) -> bool:
    """Whether a client is on this machine, and reads the same files."""
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:  # a name, as in-process clients have it
        return False


def weights_token_of(request: Request, given: str | None = None) -> str | None:
    """The weights access token of a request: from its body, its header, or in the key's place.

    SDKs before 0.26 put it where the API key belongs, when they ask what a checkpoint is.
    """
    token = given or request.headers.get("x-tinker-weights-access-token")
    key = request.headers.get("x-api-key")
    return token or (key if key is not None and key.startswith(TOKEN_PREFIX) else None)


def release_of(version: str | None) -> tuple[int, int] | None:
    """The release of the official SDK that a version names, as (major, minor)."""
    found = _RELEASE.match(version or "")
    return (int(found[1]), int(found[2])) if found is not None else None


def known_kinds(request: Request) -> Collection[CheckpointKind]:
    """The kinds of checkpoints that a client can read a list of.

    The official SDK before 0.28, and Tinkex, fail on a list that holds an external one.
    """
    release = release_of(request.headers.get("x-stainless-package-version"))
    old = release is not None and release < _FIRST_WITH_EXTERNAL
    ours = request.headers.get("user-agent", "").lower().startswith("everstep")
    if (old and not ours) or is_tinkex(request):
        return (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)
    return tuple(CheckpointKind)


async def body_of(request: Request) -> bytes:
    """Read a body, decompressed, and never keep more of it than the bound.

    What is beyond the bound is read all the same, up to another one: many clients look for an
    answer only when they have sent everything.

    Raises:
        BodyTooLarge: there is more.
        InvalidRequest: its encoding is unknown, or it is damaged.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        elif size > _MAX_DROPPED_BYTES:
            break
    body, encoding = b"".join(parts), request.headers.get("content-encoding")
    try:
        if size > MAX_BODY_BYTES:
            raise too_large(MAX_BODY_BYTES)
        return decompress(body, encoding, MAX_BODY_BYTES)
    except BodyTooLarge as error:
        error.head = head(body, encoding, _HEAD_BYTES)
        raise


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error as ``{"detail": …}`` with the status that fits."""

    @app.exception_handler(Rejected)
    async def rejected(request: Request, error: Rejected) -> JSONResponse:
        return _error(request, *refusal(error))

    @app.exception_handler(WireError)
    async def wire_error(request: Request, error: WireError) -> JSONResponse:
        return _error(request, *refusal(error))

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

    @app.exception_handler(Exception)  # it is logged as well
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return _error(request, 500, "The service failed to answer this; its log says why.")

    @app.exception_handler(LedgerDamaged)
    async def damaged(request: Request, error: LedgerDamaged) -> JSONResponse:
        _log.error("damaged", reason=str(error))
        return _error(request, 500, str(error))

    @app.exception_handler(StoreFailed)
    async def unreachable(request: Request, error: StoreFailed) -> JSONResponse:
        return _error(request, *refusal(error))

    @app.exception_handler(NotWritten)
    async def not_written(request: Request, error: NotWritten) -> JSONResponse:
        _log.error("not accepted", reason=str(error))
        return _error(
            request, 503, "The service could not write to its disk; nothing was accepted."
        )


def refusal(error: Rejected | WireError | StoreFailed) -> tuple[int, str, float | None]:
    """How a request is refused, in whatever form: status, text, and seconds until it may come."""
    if isinstance(error, Rejected):
        return error.status, error.detail, error.retry_after
    if isinstance(error, StoreFailed):
        _log.error("the vault's store failed", reason=str(error))
        return 503, f"The service can't reach its vault; try again. {error}", None
    return 413 if isinstance(error, BodyTooLarge) else 400, str(error), None


def _error(
    request: Request, status: int, detail: Any, retry_after: float | None = None
) -> JSONResponse:
    content = {"detail": detail}
    if is_tinkex(request):
        content["message"] = detail  # where it looks for the text
    headers = retry_headers(status, retry_after)
    return JSONResponse(content, status_code=status, headers=headers)


def retry_headers(status: int, retry_after: float | None) -> dict[str, str]:
    """When a refused request may be sent again, as SDKs read it; nothing where that won't help."""
    headers = {}
    if retry_after is not None:
        headers["retry-after-ms"] = str(round(retry_after * 1000))
    if status == 503 or retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after or 1))
    return headers
