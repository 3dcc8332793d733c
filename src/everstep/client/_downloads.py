"""Downloads of checkpoints, from any service that speaks the protocol.

An external checkpoint is fetched file by file, any other as a tar. A service that has no tars
gives training checkpoints another way: they are loaded into a run of their own and saved as an
external checkpoint, which is deleted afterwards.

A download is whole or absent: its directory appears when every file is there and verified. What is
there before lies beside it, ``.<name>.part``, and the next attempt goes on with that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from everstep.client._archive import unpack
from everstep.client._errors import APIStatusError, DownloadError, NotFoundError
from everstep.client._fetching import Address, Fetcher, Progress
from everstep.client.rest_client import RestClient
from everstep.client.service_client import ServiceClient
from everstep.wire import types
from everstep.wire.paths import CheckpointKind, parse_path

ARCHIVE = "checkpoint.tar"
_RENEW_BEFORE = timedelta(minutes=5)
_EXPORT = "download"
_EXPORT_SECONDS = 3600
_NO_ARCHIVES = (404, 405, 501)


def download_checkpoint(
    service: ServiceClient,
    tinker_path: str,
    directory: Path | str,
    *,
    progress: Progress | None = None,
) -> list[Path]:
    """Download a checkpoint's files into a directory.

    Interrupted, it goes on where it was when it is called again. Sizes are checked, and hashes
    where the service says them.

    Args:
        service: where the checkpoint lies.
        tinker_path: of the checkpoint.
        directory: where the files go; it must not be there, or be empty.
        progress: called with a file's name, how many bytes of it are there, and how many there
            will be (None where the service does not say it).

    Returns:
        The files.

    Raises:
        ValueError: the path is not one of a checkpoint.
        FileExistsError: there is something in the directory.
        DownloadError: a file could not be had, or is not what it should be.
        TinkerError: the service refuses it.
        OSError: it can't be written, as on a full disk; what came is kept for the next attempt.
    """
    kind = parse_path(tinker_path).kind
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already; choose another directory")
    work = _Work(target, tinker_path)
    fetcher = Fetcher(progress)
    try:
        rest = service.create_rest_client()
        if kind is CheckpointKind.EXTERNAL:
            _fetch_external(rest, tinker_path, work, fetcher)
        elif not _fetch_archive(rest, tinker_path, work, fetcher):
            with _exported(service, tinker_path, kind) as export:
                _fetch_external(rest, export, work, fetcher, renew=True)
        return work.finish()
    except OSError as error:
        if error.filename is None:  # as of a full disk
            error.filename = str(target)
        raise
    finally:
        fetcher.close()


def unfinished_of(target: Path) -> Path:
    """Where a download lies before it is complete, beside the directory that it becomes."""
    return target.absolute().with_name(f".{target.absolute().name}.part")


class _Work:
    """What there is of a download before it is complete.

    Args:
        target: the directory that it becomes.
        tinker_path: of the checkpoint; what is there of another one is thrown away.
    """

    def __init__(self, target: Path, tinker_path: str) -> None:
        self._target = target
        self._root = unfinished_of(target)
        self.files, self.unfinished = self._root / "files", self._root / "unfinished"
        mine = self._root / "checkpoint"
        if not mine.exists() or mine.read_text() != tinker_path:
            shutil.rmtree(self._root, ignore_errors=True)
        self.files.mkdir(parents=True, exist_ok=True)
        self.unfinished.mkdir(exist_ok=True)
        mine.write_text(tinker_path)

    def place(self, name: str) -> Path:
        """Where a file belongs; raises `DownloadError` for a name that leads elsewhere."""
        path = (self.files / name).resolve()
        if not path.is_relative_to(self.files.resolve()) or path == self.files.resolve():
            raise DownloadError(f"The service names a file {name!r}, which leads elsewhere.")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> list[Path]:
        """Have the directory appear, durably; returns its files."""
        names = sorted(p.relative_to(self.files) for p in self.files.rglob("*") if p.is_file())
        for each in (self.files, *(p for p in self.files.rglob("*") if p.is_dir())):
            _sync(each)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self.files.replace(self._target)
        _sync(self._target.absolute().parent)
        shutil.rmtree(self._root, ignore_errors=True)
        return [self._target / name for name in names]


def _fetch_archive(rest: RestClient, tinker_path: str, work: _Work, fetcher: Fetcher) -> bool:
    """Fetch a checkpoint as a tar and unpack it; returns False where the service has no tars."""
    archive = work.unfinished / f"{ARCHIVE}.complete"
    address = Address(
        lambda: rest.get_checkpoint_archive_url_from_tinker_path(tinker_path).result().url
    )
    try:
        _ = address.url
    except APIStatusError as error:
        if error.status_code not in _NO_ARCHIVES:
            raise
        rest.get_weights_info_by_tinker_path(tinker_path).result()  # else it is not there at all
        return False
    fetcher.fetch(ARCHIVE, address, work.unfinished / ARCHIVE, archive)
    shutil.rmtree(work.files)
    work.files.mkdir()
    unpack(archive, work.files)
    return True


def _fetch_external(
    rest: RestClient, tinker_path: str, work: _Work, fetcher: Fetcher, *, renew: bool = False
) -> None:
    """Fetch the files of an external checkpoint, one after the other."""
    addresses = _Addresses(rest, tinker_path, renew)
    names = sorted(addresses.current().urls)
    if not names:
        raise DownloadError(f"{tinker_path} has no files.")
    for number, name in enumerate(names):
        place, unfinished = work.place(name), work.unfinished / str(number)
        fetcher.fetch(name, Address(addresses.of(name)), unfinished, place)


class _Addresses:
    """The addresses of an external checkpoint's files, asked for again before they expire."""

    def __init__(self, rest: RestClient, tinker_path: str, renew: bool) -> None:
        self._rest = rest
        self._path = tinker_path
        self._renew = renew
        self._answer: types.ExternalWeightsUrlsResponse | None = None

    def current(self) -> types.ExternalWeightsUrlsResponse:
        """Addresses that work for a while."""
        known = self._answer
        if known is None or known.expires - datetime.now(UTC) < _RENEW_BEFORE:
            known = self._rest.get_external_weights_urls(self._path).result()
            if self._renew:  # the files have to stay for as long as their addresses work
                ttl = self._rest.set_checkpoint_ttl_from_tinker_path(self._path, _EXPORT_SECONDS)
                ttl.result()
            self._answer = known
        return known

    def of(self, name: str) -> Callable[[], str]:
        """What gives the address of a file."""
        used: list[types.ExternalWeightsUrlsResponse] = []

        def find() -> str:
            if used and used[-1] is self._answer:
                self._answer = None  # it did not work
            answer = self.current()
            used.append(answer)
            if name not in answer.urls:
                raise DownloadError(f"{self._path} has no file {name} any more.")
            return answer.urls[name]

        return find


@contextmanager
def _exported(service: ServiceClient, tinker_path: str, kind: CheckpointKind) -> Iterator[str]:
    """A training checkpoint's adapter as an external checkpoint, until the block ends."""
    if kind is not CheckpointKind.TRAINING:
        raise DownloadError(
            f"This service does not let {tinker_path} be downloaded. Save the adapter with "
            "save_weights_external, or download a training checkpoint."
        )
    run = service.create_training_client_from_state(tinker_path).result()
    saved = run.save_weights_external(_EXPORT, ttl_seconds=_EXPORT_SECONDS).result()
    try:
        yield saved.path
    finally:
        with suppress(NotFoundError):  # it has expired
            service.create_rest_client().delete_checkpoint_from_tinker_path(saved.path).result()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
