"""Hugging Face hub: tokenizers at the hub's paths, for clients with ``HF_ENDPOINT=…/hub``.

The listings show such clients which chat templates a tokenizer has besides its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from everstep.runtime import Rejected
from everstep.server.direct import Handler
from everstep.server.openapi import errors
from everstep.server.requests import CurrentRuntime

_LISTING = "/api/models/{model_name:path}/tree/{revision}"
_FILE = "/{model_name:path}/resolve/{revision}/{file_name:path}"


class _Route(APIRoute):
    """A route that answers for an unknown model as the hub does."""

    def get_route_handler(self) -> Handler:  # type: ignore[override]  # a coroutine is awaitable
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except Rejected as refusal:
                if refusal.status != 404:
                    raise
                return _missing("RepoNotFound", refusal.detail, {})

        return handle


router = APIRouter(prefix="/hub", tags=["models"], route_class=_Route)


@router.head(_FILE, responses=errors(404), response_class=Response)
@router.get(_FILE, responses=errors(404), response_class=Response)
async def resolve(
    runtime: CurrentRuntime, model_name: str, revision: str, file_name: str
) -> Response:
    """Return a file of a served model's tokenizer. Every revision gives the same file."""
    files = await runtime.tokenizer_files(model_name)
    headers = {"X-Repo-Commit": _commit(files)}
    if file_name not in files:
        detail = f"The tokenizer of {model_name} has no file {file_name}."
        return _missing("EntryNotFound", detail, headers)
    content = files[file_name]
    headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.get(_LISTING, responses=errors(404))
@router.get(f"{_LISTING}/{{directory:path}}", responses=errors(404))
async def list_directory(
    runtime: CurrentRuntime,
    model_name: str,
    revision: str,
    directory: str = "",
    recursive: bool = False,
) -> Response:
    """List a directory of a served model's tokenizer. Every revision is the same."""
    files = await runtime.tokenizer_files(model_name)
    prefix = f"{directory.strip('/')}/".removeprefix("/")
    inside = {name: content for name, content in files.items() if name.startswith(prefix)}
    if not inside:
        detail = f"The tokenizer of {model_name} has no directory {directory}."
        return _missing("EntryNotFound", detail, {"X-Repo-Commit": _commit(files)})
    entries: dict[str, dict[str, Any]] = {}
    for name, content in inside.items():
        below, is_deeper, _ = name.removeprefix(prefix).partition("/")
        path = prefix + below if is_deeper and not recursive else name
        kind = "file" if path == name else "directory"
        oid = hashlib.sha1(path.encode() + content, usedforsecurity=False).hexdigest()
        size = len(content) if path == name else 0
        entries[path] = {"type": kind, "oid": oid, "size": size, "path": path}
    return JSONResponse(list(entries.values()))


@router.get("/api/models/{model_name:path}", responses=errors(404))
async def describe(runtime: CurrentRuntime, model_name: str) -> Response:
    """Describe a served model's tokenizer as a repository."""
    name, _, _ = model_name.partition("/revision/")
    files = await runtime.tokenizer_files(name)
    siblings = [{"rfilename": each} for each in files]
    described = {"id": name, "modelId": name, "sha": _commit(files), "private": False}
    return JSONResponse({**described, "tags": [], "siblings": siblings})


def _missing(code: str, detail: str, headers: Mapping[str, str]) -> Response:
    """Answer 404 with an error code that the hub's clients know."""
    return JSONResponse({"detail": detail}, 404, headers={**headers, "X-Error-Code": code})


def _commit(files: Mapping[str, bytes]) -> str:
    """Return forty digits in place of a commit hash, which differ for any other files."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(hashlib.sha256(content).digest() + name.encode() + b"\0")
    return digest.hexdigest()[:40]
