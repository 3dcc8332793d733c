"""``everstep mirror`` at work: a run of another Tinker service, copied here piece by piece.

Of each checkpoint the files are downloaded, verified, and imported; one whole run there is one
collection here, so that what is here already is known by its name and by when it was saved.

    <home>/mirror/<run>/<checkpoint>/    on its way; goes on where it was when it is begun again

Both are hashes, the second also of when the checkpoint was saved. Whatever kills the command, the
next one goes on: a download resumes, an import that had been made is found and not made twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from everstep.cli import listing, output
from everstep.cli.checkpoint_import import send
from everstep.cli.download_work import check
from everstep.cli.errors import Refused, exit_code, text_of
from everstep.cli.stopping import Wish, stop_wished
from everstep.cli.target import Service, Target
from everstep.client import ServiceClient, download_checkpoint
from everstep.client._downloads import unfinished_of
from everstep.interchange.archive import files_of, pack
from everstep.wire.paths import CheckpointKind, TinkerPath, parse_path
from everstep.wire.responses import Checkpoint
from everstep.wire.transfer import ImportQuery, collection_run_id

_KINDS = (CheckpointKind.TRAINING, CheckpointKind.SAMPLER)
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Source:
    """What is mirrored.

    Attributes:
        url: of the service that has it.
        api_key: for it.
        run: its id there.
        base_model: what the service here calls its base model; None: the same.
    """

    url: str
    api_key: str | None
    run: str
    base_model: str | None

    @property
    def collection(self) -> str:
        """What its checkpoints have in common here."""
        return f"{self.url.rstrip('/')} {self.run}"


@dataclass
class Round:
    """What one look at the source gave.

    Attributes:
        copied: paths here by the paths there.
        there: paths here of what had been copied before.
        failed: why, by the paths there; by the service's address where it lists nothing.
    """

    copied: dict[str, str] = field(default_factory=dict)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def mirror(target: Target, source: Source, every: float | None) -> bool:
    """Copy what is new, once or again and again until it is stopped; print what came of it.

    Args:
        target: the service here.
        source: what is mirrored.
        every: seconds from look to look; None: one look.

    Returns:
        Whether everything that is there is here.

    Raises:
        NotFound: there is no such run.
        NotOffered: the service here is not Everstep.
        Refused: another command is mirroring this run here.
    """
    home = target.home.expanduser().resolve()
    with (
        target.service() as here,
        ServiceClient(base_url=source.url, api_key=source.api_key) as client,
        _alone(directory_of(home, source)) as directory,
        stop_wished(lambda: print("everstep: stopping", file=sys.stderr)) as wish,
    ):
        here.only_everstep("mirror")
        there = Service(client, target)
        listed = listing.of_run(there.rest, source.run)
        done = _look(here, there, source, directory, listed, wish)
        while True:
            _print(done, target.as_json)
            if every is None or _stopped(wish, every):
                return not done.failed
            try:
                listed = listing.of_run(there.rest, source.run)
            except Exception as error:
                if exit_code(error) is None:
                    raise
                done = Round(failed={source.url: text_of(error)})  # it may be back at the next look
            else:
                done = _look(here, there, source, directory, listed, wish)


def directory_of(home: Path, source: Source) -> Path:
    """Where the checkpoints of a run are while they are on their way."""
    return home / "mirror" / _hash(source.collection)


@contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """Have the downloads of a run to oneself."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = "Another 'everstep mirror' of this run is at work on this home; it copies all."
            raise Refused(text) from error
        yield directory
    finally:
        os.close(handle)


def _stopped(wish: Wish, seconds: float) -> bool:
    """Wait for the next look, or until the command is to stop; the protocol has no event for it."""
    until = time.monotonic() + seconds
    while wish.signal is None and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_SECONDS))
    return wish.signal is not None


def _look(
    here: Service,
    there: Service,
    source: Source,
    directory: Path,
    listed: Sequence[Checkpoint],
    wish: Wish,
) -> Round:
    """Copy what is listed there and isn't here."""
    done = Round()
    places = {each.tinker_path: directory / _place(each) for each in listed}
    _keep_only(directory, places.values())
    for checkpoint in sorted(listed, key=lambda each: each.time):
        if wish.signal is not None:
            break
        path = parse_path(checkpoint.tinker_path)
        if path.kind not in _KINDS:
            continue
        mine = str(TinkerPath(collection_run_id(source.collection), path.kind, path.name))
        files = places[checkpoint.tinker_path]
        try:
            if _is_here(here, mine, checkpoint):
                done.there.append(mine)
                _clear(files)  # it was killed after the import
            else:
                done.copied[checkpoint.tinker_path] = _copy(here, there, source, checkpoint, files)
        except Exception as error:
            if exit_code(error) is None:
                raise
            done.failed[checkpoint.tinker_path] = text_of(error)
    return done


def _is_here(here: Service, mine: str, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was copied before, as it is there now."""
    from everstep.client._errors import NotFoundError

    try:
        details = here.details(mine)
    except NotFoundError:
        return False
    imported = details.imported if details is not None else None
    return imported is not None and imported.get("saved_at") == checkpoint.time.isoformat()


def _copy(
    here: Service, there: Service, source: Source, checkpoint: Checkpoint, files: Path
) -> str:
    """Download a checkpoint into a directory, and import it; returns its path here."""
    path = parse_path(checkpoint.tinker_path)
    with output.progress_bar(path.name, quiet=here.target.as_json) as told:
        if not files.exists():
            download_checkpoint(
                there.client,
                checkpoint.tinker_path,
                files,
                progress=lambda name, so_far, size: told(so_far, size or so_far),
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
    found = files_of(files)
    done = send(here, query, lambda: pack(found), f"{files.parent.name}-{files.name}")
    _clear(files)
    for note in done.notes:
        output.messages().print(f"{checkpoint.tinker_path}: {note}")
    return done.tinker_path


def _place(checkpoint: Checkpoint) -> str:
    """What a checkpoint's files are called on their way; as it is there now."""
    return _hash(f"{checkpoint.tinker_path} {checkpoint.time.isoformat()}")


def _hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _clear(files: Path) -> None:
    """Remove what a download left, also one that was killed as it became complete."""
    for leftover in (files, unfinished_of(files)):
        shutil.rmtree(leftover, ignore_errors=True)


def _keep_only(directory: Path, places: Iterable[Path]) -> None:
    """Remove what was on its way of checkpoints that are gone there, or were saved anew."""
    kept = {name for files in places for name in (files.name, unfinished_of(files).name)}
    for leftover in directory.iterdir():
        if leftover.name not in kept:
            shutil.rmtree(leftover, ignore_errors=True)


def _print(done: Round, as_json: bool) -> None:
    if as_json:
        print(json.dumps(vars(done)), flush=True)  # a line a look
        return
    out = output.console()
    for theirs, ours in done.copied.items():
        out.print(f"{theirs} → {ours}")
    for theirs, why in done.failed.items():
        out.print(f"{theirs} could not be copied: {why}")
    if done.there and not done.copied and not done.failed:
        out.print(f"All {output.counted(len(done.there), 'checkpoint')} are here.")
