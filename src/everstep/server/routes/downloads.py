"""Downloads: signed URLs of checkpoint files, and the files."""

from __future__ import annotations

import base64
from email.utils import format_datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse

from everstep.runtime import Runtime
from everstep.runtime.checkpoints.downloads import Address, Download
from everstep.server.openapi import errors
from everstep.server.ranges import Unsatisfiable, requested
from everstep.server.requests import CurrentRuntime, WeightsToken
from everstep.wire import types

router = APIRouter(tags=["downloads"])
_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_CONTENTS = {
    **errors(400, 403, 404),
    200: {"description": "The whole content", "content": {"application/octet-stream": _BYTES}},
    206: {"description": "The range", "content": {"application/octet-stream": _BYTES}},
    416: {"model": types.ErrorResponse, "description": "The range begins behind the end"},
}


async def _signed(
    tag: str = Query(), expires: str = Query(), signature: str = Query()
) -> dict[str, str]:
    """Return the parameters of a URL as they were signed."""
    return {"tag": tag, "expires": expires, "signature": signature}


Signed = Annotated[dict[str, str], Depends(_signed)]


@router.get(f"{_CHECKPOINT}/external_weights_urls", responses=errors(400, 404))
async def external_weights_urls(
    request: Request,
    runtime: CurrentRuntime,
    weights_token: WeightsToken,
    run_id: str,
    kind: str,
    name: str,
) -> types.ExternalWeightsUrlsResponse:
    """Return a URL for each file of an external checkpoint, valid for an hour without headers."""
    addresses = await runtime.downloads.file_addresses(run_id, f"{kind}/{name}", weights_token)
    at = {"run_id": run_id, "kind": kind, "name": name}
    return types.ExternalWeightsUrlsResponse(
        urls={str(each.file): _url(request, each, at) for each in addresses},
        expires=min(each.expires for each in addresses),
    )


@router.get(
    f"{_CHECKPOINT}/archive",
    response_model=types.CheckpointArchiveUrlResponse,
    responses={
        **errors(400, 404),
        302: {"description": "The URL in Location, its expiry in Expires"},
    },
)
async def archive(
    request: Request,
    runtime: CurrentRuntime,
    weights_token: WeightsToken,
    run_id: str,
    kind: str,
    name: str,
) -> Response:
    """Return the URL of a checkpoint as a tar, as JSON where that is accepted or as a redirect."""
    address = await runtime.downloads.archive_address(run_id, f"{kind}/{name}", weights_token)
    url = _url(request, address, {"run_id": run_id, "kind": kind, "name": name})
    if _wants_json(request):
        answer = types.CheckpointArchiveUrlResponse(url=url, expires=address.expires)
        return JSONResponse(answer.model_dump(mode="json"))
    until = format_datetime(address.expires, usegmt=True)
    return RedirectResponse(url, status_code=302, headers={"Expires": until})


@router.get(
    "/everstep/downloads/{run_id}/{kind}/{name}/{file}",
    response_class=StreamingResponse,
    responses=_CONTENTS,
)
async def download_file(
    request: Request,
    runtime: CurrentRuntime,
    run_id: str,
    kind: str,
    name: str,
    file: str,
    signed: Signed,
) -> Response:
    """Return a checkpoint's file by its signed URL. No headers are needed.

    `ETag` is its BLAKE3. `Range` and `If-Range` resume a download.
    """
    found = await runtime.downloads.open(run_id, f"{kind}/{name}", file, signed)
    return _answer(request, runtime, found, file)


@router.get(
    "/everstep/archives/{run_id}/{kind}/{name}",
    response_class=StreamingResponse,
    responses=_CONTENTS,
)
async def download_archive(
    request: Request, runtime: CurrentRuntime, run_id: str, kind: str, name: str, signed: Signed
) -> Response:
    """Return a checkpoint as a tar by its signed URL. No headers are needed.

    A checkpoint always gives the same bytes, so `Range` and `If-Range` resume a download.
    """
    found = await runtime.downloads.open(run_id, f"{kind}/{name}", None, signed)
    return _answer(request, runtime, found, f"{name}.tar")


def _wants_json(request: Request) -> bool:
    """Return whether a client reads the URL as JSON.

    SDKs before 0.19 accept JSON in every request, and gzip as well here, but they can only read a
    redirect.
    """
    accepted = " ".join(request.headers.getlist("accept"))
    return "application/json" in accepted and "application/gzip" not in accepted


def _url(request: Request, address: Address, at: dict[str, str]) -> str:
    route = "download_archive" if address.file is None else "download_file"
    given = at if address.file is None else {**at, "file": address.file}
    return str(request.url_for(route, **given).include_query_params(**address.query))


def _answer(request: Request, runtime: Runtime, download: Download, filename: str) -> Response:
    """Return a content, or the range of it that is requested."""
    size, tag = download.content.size, f'"{download.content.tag}"'
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-transform",
        "Content-Disposition": f'attachment; filename="{filename}"',
        "Repr-Digest": f"sha-256=:{base64.b64encode(download.sha256).decode()}:",
    }
    try:
        span = requested(request.headers, tag, size)
    except Unsatisfiable:
        detail = {"detail": f"The range begins behind the end: there are {size} bytes."}
        headers["Content-Range"] = f"bytes */{size}"
        return JSONResponse(detail, status_code=416, headers=headers)
    start, stop = span or (0, size)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return StreamingResponse(
        runtime.downloads.read(download, start, stop),
        status_code=206 if span else 200,
        headers={**headers, "Content-Length": str(stop - start)},
        media_type="application/octet-stream",
    )
