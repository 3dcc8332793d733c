"""Tokenizers at the hub's addresses, for clients that know no others: ``HF_ENDPOINT=…/hub``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from everstep.runtime import Rejected
from everstep.server.common import runtime_of
from everstep.server.openapi import errors

router = APIRouter(prefix="/hub", tags=["models"])
_FILE = "/{model_name:path}/resolve/{revision}/{file_name:path}"


@router.head(_FILE, responses=errors(404), response_class=Response)
@router.get(_FILE, responses=errors(404), response_class=Response)
async def resolve(request: Request, model_name: str, revision: str, file_name: str) -> Response:
    """A file of a served model's tokenizer, whatever the revision: the service has one."""
    try:
        files = await runtime_of(request).tokenizer_files(model_name)
    except Rejected as refusal:
        if refusal.status != 404:
            raise
        return _missing("RepoNotFound", refusal.detail, {})
    headers = {"X-Repo-Commit": _commit(files)}
    if file_name not in files:
        detail = f"The tokenizer of {model_name} has no file {file_name}."
        return _missing("EntryNotFound", detail, headers)
    content = files[file_name]
    headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
    return Response(content, media_type="application/octet-stream", headers=headers)


def _missing(code: str, detail: str, headers: Mapping[str, str]) -> Response:
    """What isn't there, with the code by which the hub's clients tell what that is."""
    return JSONResponse({"detail": detail}, 404, headers={**headers, "X-Error-Code": code})


def _commit(files: Mapping[str, bytes]) -> str:
    """What stands for a commit: forty digits, others for any other files."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(hashlib.sha256(content).digest() + name.encode() + b"\0")
    return digest.hexdigest()[:40]
