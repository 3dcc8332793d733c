"""Checkpoint downloads, from any service that speaks the protocol.

An external checkpoint is downloaded file by file, any other as a tar. If a service has no tars,
a training checkpoint is loaded into a run and saved as an external checkpoint, which is deleted
afterwards.

A download is complete or absent: its directory appears once every file is there and verified. Until
then its content is in ``.<name>.part`` beside it, and the next attempt continues from there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from everstep.client._downloads.resumable import Downloader, Progress, RenewableUrl
from everstep.client._transport.archive import unpack
from everstep.client._transport.errors import APIStatusError, DownloadError, NotFoundError
from everstep.client.rest_client import RestClient
from everstep.client.service_client import ServiceClient
from everstep.durable_files import sync_directory
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

    An interrupted download continues when it is called again. Sizes are checked, and checksums if
    the service sends them.

    Args:
        service: the service that has the checkpoint.
        tinker_path: of the checkpoint.
        directory: target directory, which must be absent or empty.
        progress: called with a file's name, the bytes downloaded so far, and the total bytes (None
            if the service does not send the size).

    Returns:
        The files.

    Raises:
        ValueError: the path is not that of a checkpoint.
        FileExistsError: the directory is not empty.
        DownloadError: a file could not be downloaded, or its size or checksum is wrong.
        TinkerError: the service refuses the download.
        OSError: a file can't be written, for example on a full disk. The bytes downloaded so far
            are kept for the next attempt.
    """
    kind = parse_path(tinker_path).kind
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} already exists; choose another directory")
    partial = _PartialDownload(target, tinker_path)
    downloader = Downloader(progress)
    try:
        rest = service.create_rest_client()
        if kind is CheckpointKind.EXTERNAL:
            _download_files(rest, tinker_path, partial, downloader)
        elif not _download_archive(rest, tinker_path, partial, downloader):
            with _exported(service, tinker_path, kind) as export:
                _download_files(rest, export, partial, downloader, renew=True)
        return partial.finish()
    except OSError as error:
        if error.filename is None:  # for example from a full disk
            error.filename = str(target)
        raise
    finally:
        downloader.close()


def partial_path(target: Path) -> Path:
    """Return the path of an incomplete download, beside its target directory."""
    return target.absolute().with_name(f".{target.absolute().name}.part")


class _PartialDownload:
    """An incomplete download.

    Args:
        target: the directory that it becomes.
        tinker_path: of the checkpoint. An incomplete download of another checkpoint is discarded.
    """

    def __init__(self, target: Path, tinker_path: str) -> None:
        self._target = target
        self._root = partial_path(target)
        self.files, self.unfinished = self._root / "files", self._root / "unfinished"
        mine = self._root / "checkpoint"
        if not mine.exists() or mine.read_text(encoding="utf-8") != tinker_path:
            shutil.rmtree(self._root, ignore_errors=True)
        self.files.mkdir(parents=True, exist_ok=True)
        self.unfinished.mkdir(exist_ok=True)
        mine.write_text(tinker_path, encoding="utf-8")

    def path_of(self, name: str) -> Path:
        """Return a file's path. Raises `DownloadError` for a name outside of the directory."""
        path = (self.files / name).resolve()
        if not path.is_relative_to(self.files.resolve()) or path == self.files.resolve():
            raise DownloadError(
                f"The service lists a file {name!r}, which is outside of the directory."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> list[Path]:
        """Move the directory to its target, durably. Returns its files."""
        names = sorted(p.relative_to(self.files) for p in self.files.rglob("*") if p.is_file())
        for each in (self.files, *(p for p in self.files.rglob("*") if p.is_dir())):
            sync_directory(each)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self.files.replace(self._target)
        sync_directory(self._target.absolute().parent)
        shutil.rmtree(self._root, ignore_errors=True)
        return [self._target / name for name in names]


def _download_archive(
    rest: RestClient, tinker_path: str, partial: _PartialDownload, downloader: Downloader
) -> bool:
    """Download a checkpoint as a tar and unpack it. Returns False if the service has no tars."""
    archive = partial.unfinished / f"{ARCHIVE}.complete"
    archive_url = RenewableUrl(
        lambda: rest.get_checkpoint_archive_url_from_tinker_path(tinker_path).result().url
    )
    try:
        _ = archive_url.url
    except APIStatusError as error:
        if error.status_code not in _NO_ARCHIVES:
            raise
        rest.get_weights_info_by_tinker_path(
            tinker_path
        ).result()  # raises if the checkpoint doesn't exist
        return False
    downloader.fetch(ARCHIVE, archive_url, partial.unfinished / ARCHIVE, archive)
    shutil.rmtree(partial.files)
    partial.files.mkdir()
    unpack(archive, partial.files)
    return True


def _download_files(
    rest: RestClient,
    tinker_path: str,
    partial: _PartialDownload,
    downloader: Downloader,
    *,
    renew: bool = False,
) -> None:
    """Download the files of an external checkpoint, one after the other."""
    urls = _ExternalUrls(rest, tinker_path, renew)
    names = sorted(urls.current().urls)
    if not names:
        raise DownloadError(f"{tinker_path} has no files.")
    for number, name in enumerate(names):
        path, unfinished = partial.path_of(name), partial.unfinished / str(number)
        downloader.fetch(name, RenewableUrl(urls.of(name)), unfinished, path)


class _ExternalUrls:
    """The URLs of an external checkpoint's files, renewed before they expire."""

    def __init__(self, rest: RestClient, tinker_path: str, renew: bool) -> None:
        self._rest = rest
        self._path = tinker_path
        self._renew = renew
        self._answer: types.ExternalWeightsUrlsResponse | None = None

    def current(self) -> types.ExternalWeightsUrlsResponse:
        """Return URLs that are valid for a while."""
        known = self._answer
        if known is None or known.expires - datetime.now(UTC) < _RENEW_BEFORE:
            known = self._rest.get_external_weights_urls(self._path).result()
            if self._renew:  # keep the files for as long as their URLs work
                ttl = self._rest.set_checkpoint_ttl_from_tinker_path(self._path, _EXPORT_SECONDS)
                ttl.result()
            self._answer = known
        return known

    def of(self, name: str) -> Callable[[], str]:
        """Return a function that finds the URL of a file."""
        used: list[types.ExternalWeightsUrlsResponse] = []

        def find() -> str:
            if used and used[-1] is self._answer:
                self._answer = None  # the URL did not work
            answer = self.current()
            used.append(answer)
            if name not in answer.urls:
                raise DownloadError(f"{self._path} no longer has a file {name}.")
            return answer.urls[name]

        return find


@contextmanager
def _exported(service: ServiceClient, tinker_path: str, kind: CheckpointKind) -> Iterator[str]:
    """Export a training checkpoint's adapter as an external checkpoint, until the block ends."""
    if kind is not CheckpointKind.TRAINING:
        raise DownloadError(
            f"This service does not allow the download of {tinker_path}. Save the adapter with "
            "save_weights_external, or download a training checkpoint."
        )
    run = service.create_training_client_from_state(tinker_path).result()
    saved = run.save_weights_external(_EXPORT, ttl_seconds=_EXPORT_SECONDS).result()
    try:
        yield saved.path
    finally:
        with suppress(NotFoundError):  # it has expired
            service.create_rest_client().delete_checkpoint_from_tinker_path(saved.path).result()
