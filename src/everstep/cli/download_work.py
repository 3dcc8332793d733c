"""Fetching checkpoints, with a bar of what is there, its rate and the time left."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3
from rich.console import Console
from rich.progress import Progress, TaskID

from everstep.cli import listing, outcomes, output, tensor_diff
from everstep.cli.errors import Refused
from everstep.cli.target import Service, Target
from everstep.client import download_checkpoint
from everstep.vault.local import sync_directory
from everstep.wire.inspection import (
    CheckpointDetailsResponse,
    VerifiedFile,
    VerifyCheckpointResponse,
)
from everstep.wire.paths import SCHEME


def download(target: Target, paths: Sequence[str], parent: Path, force: bool) -> None:
    """Fetch checkpoints; see the command."""
    with target.service() as service:

        def one(path: str) -> dict[str, Any]:
            listing.one(service.rest, path)
            directory = parent / directory_name(path)
            files = fetch(service, path, directory, quiet=target.as_json, force=force)
            size = sum(each.stat().st_size for each in files)
            if not target.as_json:
                told = f"{output.counted(len(files), 'file')}, {output.size_text(size)}"
                output.messages().print(f"{directory}: {told}")
            return {"directory": str(directory), "files": sorted(each.name for each in files)}

        done = outcomes.each(paths, one)
    outcomes.tell(done, "downloaded", target.as_json)


def directory_name(path: str) -> str:
    """What the directory of a checkpoint is called, as the official command line has it."""
    return path.removeprefix(SCHEME).replace("/", "_")


def fetch(
    service: Service, path: str, directory: Path, *, quiet: bool, force: bool = False
) -> list[Path]:
    """Fetch a checkpoint's files into a directory; goes on with what an earlier attempt left.

    The directory appears, or takes the place of the one before, when all of it is verified.

    Args:
        service: where it lies.
        path: of the checkpoint.
        directory: must not be there, or be empty.
        quiet: show no bar.
        force: it may be there, and is replaced.

    Returns:
        The files.

    Raises:
        Refused: the directory is in use, or a file has another hash than its manifest says.
    """
    if directory.exists() and (not directory.is_dir() or (not force and any(directory.iterdir()))):
        raise Refused(f"{directory} is there already: choose another --output, or --force.")
    stage = directory.absolute().with_name(f".{directory.name}.unverified")
    shutil.rmtree(stage, ignore_errors=True)  # of an attempt that was killed
    found = _fetched(service, path, stage, quiet)
    try:
        check(service.details(path), found)
    except Refused:
        shutil.rmtree(stage)
        raise
    _appear(stage, directory)
    return [directory / each.relative_to(stage) for each in found]


def _fetched(service: Service, path: str, directory: Path, quiet: bool) -> list[Path]:
    """Fetch, with a bar."""
    terminal = Console(stderr=True)
    off = quiet or not terminal.is_terminal
    columns = output.transfer_columns("{task.description}")
    with Progress(*columns, console=terminal, transient=True, disable=off) as bar:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        return download_checkpoint(service.client, path, directory, progress=show)


def _appear(stage: Path, directory: Path) -> None:
    """Put what was fetched in its place, and only then remove what was there."""
    before = directory.absolute().with_name(f".{directory.name}.before")
    if directory.exists():
        shutil.rmtree(before, ignore_errors=True)
        directory.rename(before)
    stage.rename(directory)
    sync_directory(directory.absolute().parent)
    shutil.rmtree(before, ignore_errors=True)


def fetched_and_read(service: Service, path: str) -> VerifyCheckpointResponse:
    """Whether a checkpoint can be fetched, and every tensor of it read."""
    listing.one(service.rest, path)
    with tempfile.TemporaryDirectory(prefix="everstep-verify-") as temporary:
        files = fetch(service, path, Path(temporary) / "files", quiet=service.target.as_json)
        found = [_read(each) for each in sorted(files)]
    ok = all(each.error is None for each in found)
    return VerifyCheckpointResponse(tinker_path=path, ok=ok, files=found)


def _read(file: Path) -> VerifiedFile:
    error = None
    if file.suffix == ".safetensors":
        try:
            tensor_diff.read(file)
        except Refused as refusal:
            error = str(refusal)
    size = file.stat().st_size
    return VerifiedFile(name=file.name, size_bytes=size, blake3=_hash(file), error=error)


def check(details: CheckpointDetailsResponse | None, files: Sequence[Path]) -> None:
    """Compare files with the manifest, where the service tells it.

    Raises:
        Refused: one is another than was saved.
    """
    known = {} if details is None else {each.name: each.blake3 for each in details.files}
    for file in files:
        expected = known.get(file.name)
        if expected is not None and _hash(file) != expected:
            raise Refused(
                f"{file.name} came, and is not what the service saved: its hash is another. "
                "Nothing of it is kept; try again."
            )


def _hash(file: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
