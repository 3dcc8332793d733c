"""Mirroring: a run of another Tinker service, copied checkpoint by checkpoint.

The files of each checkpoint are downloaded, verified and imported. A run of the source becomes one
collection in the target, in which a copied checkpoint is recognised by its name and its time.

    <home>/mirror/<run>/<checkpoint>/    a download in progress, resumed by the next command

Both directory names are hashes. The second one includes the time at which the checkpoint was
saved. A command that is killed is continued by the next: a download resumes, and a completed
import is found and not repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from everstep.cli.checkpoint.download import check
from everstep.cli.checkpoint.import_ import send
from everstep.cli.common import listing, output
from everstep.cli.common.errors import Refused, error_text, exit_code
from everstep.cli.common.progress_bars import progress_bar
from everstep.cli.common.target import Service, Target
from everstep.cli.train.interrupt import StopRequest, stop_requested
from everstep.client import ServiceClient, download_checkpoint
from everstep.client._downloads.checkpoint import partial_path
from everstep.interchange.archive import adapter_files, pack
from everstep.wire.messages.responses import Checkpoint
from everstep.wire.messages.transfer import ImportQuery, collection_run_id
from everstep.wire.paths import CheckpointKind, TinkerPath, parse_path

_KINDS = (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)


@dataclass(frozen=True)
class Source:
    """The run to mirror.

    Attributes:
        url: address of the source, the service with the run.
        api_key: API key of the source.
        run: id of the run.
        base_model: the target's name of the base model, or None for the same as the source's.
    """

    url: str
    api_key: str | None
    run: str
    base_model: str | None

    @property
    def collection(self) -> str:
        """Name of the collection in the target."""
        return f"{self.url.rstrip('/')} {self.run}"


@dataclass
class Round:
    """The result of one poll of the source.

    Attributes:
        copied: target path of each copied checkpoint, by source path.
        there: target paths of the checkpoints that were copied before.
        failed: reason of each failure, by source path, or by address if the source can't be listed.
        skipped: reason of each checkpoint that was not tried, by source path.
    """

    copied: dict[str, str] = field(default_factory=dict)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def mirror_run(target: Target, source: Source, every: float | None) -> bool:
    """Copy new checkpoints, once or until a signal stops it, and print the results.

    Args:
        target: the service to copy to.
        source: the run to mirror.
        every: polling interval in seconds, or None to poll once.

    Returns:
        Whether the last poll had no failure, and a single one was not stopped.

    Raises:
        NotFound: there is no such run.
        NotOffered: the target is not Everstep.
        Refused: another command mirrors this run to this home.
    """
    home = target.home.expanduser().resolve()
    with (
        target.service() as here,
        ServiceClient(base_url=source.url, api_key=source.api_key) as client,
        _exclusive(directory_of(home, source)) as directory,
        stop_requested(lambda: print("everstep: stopping", file=sys.stderr)) as stop,
    ):
        here.require_everstep("mirror")
        there = Service(client, target)
        listed = listing.of_run(there.rest, source.run)
        done = _poll(here, there, source, directory, listed, stop)
        while True:
            _print(done, target.as_json)
            if every is None or stop.wait(every):
                return not done.failed and (every is not None or stop.signal is None)
            try:
                listed = listing.of_run(there.rest, source.run)
            except Exception as error:
                if exit_code(error) is None:
                    raise
                done = Round(
                    failed={source.url: error_text(error)}
                )  # it may be back at the next poll
            else:
                done = _poll(here, there, source, directory, listed, stop)


def directory_of(home: Path, source: Source) -> Path:
    """Return the directory of a run's downloads in progress."""
    return home / "mirror" / _hash(source.collection)


@contextmanager
def _exclusive(directory: Path) -> Iterator[Path]:
    """Lock the downloads of a run."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = "Another 'everstep mirror' is already mirroring this run to this home."
            raise Refused(text) from error
        yield directory
    finally:
        os.close(handle)


def _poll(
    here: Service,
    there: Service,
    source: Source,
    directory: Path,
    listed: Sequence[Checkpoint],
    stop: StopRequest,
) -> Round:
    """Copy the listed checkpoints that the target lacks."""
    done = Round()
    downloads = {each.tinker_path: directory / _download_name(each) for each in listed}
    _remove_stale(directory, downloads.values())
    for checkpoint in sorted(listed, key=lambda each: each.time):
        path = parse_path(checkpoint.tinker_path)
        if path.kind not in _KINDS:
            done.skipped[checkpoint.tinker_path] = f"{path.kind} checkpoints can't be copied"
            continue
        if stop.signal is not None:
            done.skipped[checkpoint.tinker_path] = "stopped before it"
            continue
        copied_path = str(TinkerPath(collection_run_id(source.collection), path.kind, path.name))
        files = downloads[checkpoint.tinker_path]
        try:
            if _is_copied(here, copied_path, checkpoint):
                done.there.append(copied_path)
                _clear(files)  # a command was killed after the import
            else:
                done.copied[checkpoint.tinker_path] = _copy(here, there, source, checkpoint, files)
        except Exception as error:
            if exit_code(error) is None:
                raise
            done.failed[checkpoint.tinker_path] = error_text(error)
    return done


def _is_copied(here: Service, path: str, checkpoint: Checkpoint) -> bool:
    """Return whether the current state of a checkpoint was copied before."""
    from everstep.client._transport.errors import NotFoundError

    try:
        details = here.details(path)
    except NotFoundError:
        return False
    imported = details.imported if details is not None else None
    return imported is not None and imported.get("saved_at") == checkpoint.time.isoformat()


def _copy(
    here: Service, there: Service, source: Source, checkpoint: Checkpoint, files: Path
) -> str:
    """Download a checkpoint into a directory and import it. Returns its path in the target."""
    path = parse_path(checkpoint.tinker_path)
    with progress_bar(path.name, quiet=here.target.as_json) as update:
        if not files.exists():
            download_checkpoint(
                there.client,
                checkpoint.tinker_path,
                files,
                progress=lambda name, so_far, size: update(so_far, size or so_far),
            )
    details = there.details(checkpoint.tinker_path)
    try:
        check(details, list(files.iterdir()))
    except Refused:
        _clear(files)
        raise
    metadata = checkpoint.user_metadata
    query = ImportQuery(
        name=path.name,
        kind="training" if path.kind is CheckpointKind.TRAINING else "sampler",
        base_model=source.base_model,
        source=checkpoint.tinker_path,
        collection=source.collection,
        saved_at=checkpoint.time,
        step=details.step if details is not None else 0,
        overwrite=True,
        user_metadata=json.dumps(metadata) if metadata is not None else None,
    )
    found = adapter_files(files)
    done = send(here, query, lambda: pack(found), f"{files.parent.name}-{files.name}")
    _clear(files)
    for note in done.notes:
        output.messages().print(f"{checkpoint.tinker_path}: {note}")
    return done.tinker_path


def _download_name(checkpoint: Checkpoint) -> str:
    """Return the directory name of a checkpoint's download. Its current state has its own."""
    return _hash(f"{checkpoint.tinker_path} {checkpoint.time.isoformat()}")


def _hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _clear(files: Path) -> None:
    """Remove a download, complete or not."""
    for leftover in (files, partial_path(files)):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove_stale(directory: Path, downloads: Iterable[Path]) -> None:
    """Remove downloads of checkpoints that were deleted or saved again in the source."""
    kept = {name for files in downloads for name in (files.name, partial_path(files).name)}
    for leftover in directory.iterdir():
        if leftover.name not in kept:
            shutil.rmtree(leftover, ignore_errors=True)


def _print(done: Round, as_json: bool) -> None:
    if as_json:
        print(json.dumps(vars(done)), flush=True)  # a line for each poll
        return
    out = output.console()
    for source, copy in done.copied.items():
        out.print(f"{source} → {copy}")
    for source, reason in done.failed.items():
        out.print(f"{source} could not be copied: {reason}")
    for source, reason in done.skipped.items():
        out.print(f"{source} was skipped: {reason}")
    if done.there and not done.copied and not done.failed:
        out.print(f"All {output.counted(len(done.there), 'checkpoint')} are up to date.")
