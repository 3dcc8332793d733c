"""``everstep checkpoint import``: an adapter that was made elsewhere, sent to the service.

What it is made of is checked there. The upload is streamed; where it breaks off it is sent again,
with the same key, so that it makes one checkpoint however often that happens.
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

from everstep.cli import output
from everstep.cli.errors import Refused, Unreachable
from everstep.cli.target import Service, Target
from everstep.interchange.archive import files_of, pack
from everstep.interchange.errors import Unreadable
from everstep.wire.transfer import ImportQuery, ImportResponse

_ROUTE = "/api/v1/everstep/checkpoints/import"
_PIECE = 1 << 20
_GZIP = b"\x1f\x8b"
_ATTEMPTS = 5
_DELAY_SECONDS = 1.0
_ANSWER_SECONDS = 600.0
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._+=-]+", re.ASCII)


def import_(target: Target, source: Path, name: str | None, base_model: str | None) -> None:
    """Import an adapter and print what came of it.

    Args:
        target: the service.
        source: a directory, or a tar (gzipped or not).
        name: of the checkpoint; None: the source's.
        base_model: what the service calls its base model; None: what the adapter says.

    Raises:
        Refused: the service does not take it, or is none that can.
        InterchangeError: the directory holds no adapter.
    """
    query = ImportQuery(
        name=name if name is not None else _name_of(source),
        base_model=base_model,
        source=source.resolve().name,
    )
    if source.is_dir():
        files_of(source)  # what is missing is told before anything is sent
    with target.service() as service:
        service.only_everstep("checkpoint import")
        done = send(service, query, lambda: _tar(source), str(uuid.uuid4()))
    if target.as_json:
        output.print_json(done.model_dump())
        return
    out = output.console()
    rest = "with its optimizer state" if done.has_optimizer else "weights only, no optimizer state"
    out.print(f"{source} is {done.tinker_path} ({output.size_text(done.size_bytes)}; {rest}).")
    for note in done.notes:
        out.print(note)
    how = "_with_optimizer" if done.has_optimizer else ""
    out.print(f"Go on from it with create_training_client_from_state{how}.")


def send(
    service: Service, query: ImportQuery, body: Callable[[], Iterator[bytes]], key: str
) -> ImportResponse:
    """Send an import, again where it breaks off.

    Args:
        service: an Everstep service.
        query: what it becomes.
        body: makes the tar, once an attempt.
        key: the same one makes the same checkpoint.

    Raises:
        Refused: the service does not take it.
        Unreachable: it broke off too often.
    """
    headers = {"X-API-Key": service.target.api_key or "tml-local", "X-Idempotency-Key": key}
    params = query.model_dump(exclude_none=True)
    why = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_DELAY_SECONDS * 2 ** (attempt - 1))  # the service may be starting again
        try:
            answer = httpx.post(
                service.url + _ROUTE,
                params=params,
                content=body(),
                headers=headers,
                timeout=httpx.Timeout(_ANSWER_SECONDS, connect=10.0),
            )
        except httpx.TransportError as error:
            why = repr(error)
            continue
        if answer.status_code == 503:
            why = _detail(answer)
            continue
        if not answer.is_success:
            raise Refused(f"The service refused the import: {_detail(answer)}")
        return ImportResponse.model_validate(answer.json())
    raise Unreachable(f"The import broke off {_ATTEMPTS} times; the last time: {why}")


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
        yield from pack(files_of(source))
        return
    with source.open("rb") as file:
        gzipped = file.read(2) == _GZIP
    with gzip.open(source) if gzipped else source.open("rb") as content:
        try:
            while piece := content.read(_PIECE):
                yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Unreadable(f"{source} is damaged or was cut off: {error}") from error
