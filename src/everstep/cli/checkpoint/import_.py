"""Imports of adapters into a service.

The service checks the content. The upload is streamed. If the connection breaks it is sent again
with the same idempotency key, so that it makes one checkpoint however often that happens.
"""

from __future__ import annotations

import gzip
import re
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from everstep.backoff import Backoff
from everstep.cli.common import output
from everstep.cli.common.errors import Refused, Unreachable
from everstep.cli.common.target import Service, Target
from everstep.interchange.archive import adapter_files, left_out_note, other_files, pack
from everstep.interchange.errors import UnreadableFile
from everstep.wire.messages.transfer import ImportQuery, ImportResponse

_ROUTE = "/api/v1/everstep/checkpoints/import"
_CHUNK_SIZE = 1 << 20
_GZIP = b"\x1f\x8b"
_ATTEMPTS = 5
_BACKOFF = Backoff(initial=1.0, max=8.0)
_ANSWER_SECONDS = 600.0
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._+=-]+", re.ASCII)


def import_adapter(target: Target, source: Path, name: str | None, base_model: str | None) -> None:
    """Import an adapter and print the new checkpoint.

    Args:
        target: the service.
        source: a directory, or a tar (gzipped or not).
        name: name of the checkpoint, or None for that of the source.
        base_model: the service's name of the base model. None: as the adapter names it.

    Raises:
        Refused: the service refuses it.
        NotOffered: the service is not Everstep.
        InterchangeError: the directory holds no adapter.
    """
    query = ImportQuery(
        name=name if name is not None else _name_of(source),
        base_model=base_model,
        source=source.resolve().name,
    )
    left_out: list[str] = []
    if source.is_dir():
        adapter_files(source)  # raises if a file is missing, before anything is sent
        left_out = other_files(source)
    with target.service() as service:
        service.require_everstep("checkpoint import")
        done = send(service, query, lambda: _tar(source), str(uuid.uuid4()))
    done.notes += left_out_note(left_out)
    if target.as_json:
        output.print_json(done.model_dump())
        return
    out = output.console()
    state = "with its optimizer state" if done.has_optimizer else "weights only, no optimizer state"
    size = output.size_text(done.size_bytes)
    out.print(f"{source} was imported as {done.tinker_path} ({size}; {state}).")
    for note in done.notes:
        out.print(note)
    how = "_with_optimizer" if done.has_optimizer else ""
    out.print(f"Continue from it with create_training_client_from_state{how}.")


def send(
    service: Service, query: ImportQuery, body: Callable[[], Iterator[bytes]], key: str
) -> ImportResponse:
    """Send an import. Retries if the connection breaks or the service is starting.

    Args:
        service: an Everstep service.
        query: name, kind and origin of the checkpoint.
        body: creates the tar, once for each attempt.
        key: idempotency key. The same key makes the same checkpoint.

    Raises:
        Refused: the service refuses the import.
        Unreachable: every attempt failed.
    """
    headers = {"X-API-Key": service.target.api_key or "tml-local", "X-Idempotency-Key": key}
    params = query.model_dump(exclude_none=True)
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_BACKOFF.delay(attempt - 1))  # the service may be restarting
        try:
            answer = httpx.post(
                service.url + _ROUTE,
                params=params,
                content=body(),
                headers=headers,
                timeout=httpx.Timeout(_ANSWER_SECONDS, connect=10.0),
            )
        except httpx.TransportError as error:
            reason = repr(error)
            continue
        if answer.status_code == 503:
            reason = _detail(answer)
            continue
        if not answer.is_success:
            raise Refused(f"The service refused the import: {_detail(answer)}")
        return ImportResponse.model_validate(answer.json())
    raise Unreachable(f"The import failed {_ATTEMPTS} times; the last time: {reason}")


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:300]}"


def _name_of(source: Path) -> str:
    stem = source.resolve().name
    for end in (".tar.gz", ".tgz", ".tar"):
        stem = stem.removesuffix(end)
    return _NOT_IN_A_NAME.sub("-", stem).lstrip(".")[:128] or "imported"


def _tar(source: Path) -> Iterator[bytes]:
    if source.is_dir():
        yield from pack(adapter_files(source))
        return
    with source.open("rb") as file:
        gzipped = file.read(2) == _GZIP
    with gzip.open(source) if gzipped else source.open("rb") as content:
        try:
            while chunk := content.read(_CHUNK_SIZE):
                yield chunk
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UnreadableFile(f"{source} is damaged or truncated: {error}") from error
