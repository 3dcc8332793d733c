"""Downloads of checkpoints, with a progress bar."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3
from rich.console import Console
from rich.progress import Progress, TaskID

from everstep.cli.checkpoint import tensor_diff
from everstep.cli.common import listing, names, outcomes, output
from everstep.cli.common.errors import Refused
from everstep.cli.common.progress_bars import transfer_columns
from everstep.cli.common.target import Service, Target
from everstep.client import download_checkpoint
from everstep.durable_files import sync_directory
from everstep.wire.messages.inspection import (
    CheckpointDetailsResponse,
    VerifiedFile,
    VerifyCheckpointResponse,
)
from everstep.wire.paths import SCHEME


def download_checkpoints(target: Target, paths: Sequence[str], parent: Path, force: bool) -> None:
    """Download checkpoints and print the outcomes.

    Args:
        target: the service.
        paths: paths of the checkpoints.
        parent: parent of the directories, one for each checkpoint.
        force: replace existing directories.

    Raises:
        typer.Exit: with the code of the first failure, if there is one.
    """
    with target.service() as service:

        def download_one(path: str) -> dict[str, Any]:
            path = names.checkpoint_path(service.rest, path)
            listing.checkpoint(service.rest, path)
            directory = parent / directory_name(path)
            files = fetch(service, path, directory, quiet=target.as_json, force=force)
            size = sum(each.stat().st_size for each in files)
            if not target.as_json:
                summary = f"{output.counted(len(files), 'file')}, {output.size_text(size)}"
                output.messages().print(f"{directory}: {summary}")
            return {"directory": str(directory), "files": sorted(each.name for each in files)}

        done = outcomes.for_each(paths, download_one)
    outcomes.report(done, "downloaded", target.as_json)


def directory_name(path: str) -> str:
    """Return the name of a checkpoint's directory, the same as in the official command line."""
    return path.removeprefix(SCHEME).replace("/", "_")


def fetch(
    service: Service, path: str, directory: Path, *, quiet: bool, force: bool = False
) -> list[Path]:
    """Download a checkpoint's files into a directory. Resumes an interrupted download.

    The directory appears, or replaces the existing one, when all files are verified.

    Args:
        service: the service.
        path: path of the checkpoint.
        directory: the directory, absent or empty.
        quiet: show no progress bar.
        force: replace an existing directory.

    Returns:
        The files.

    Raises:
        Refused: the directory is not empty, or the hash of a file is not that of its manifest.
    """
    if directory.exists() and (not directory.is_dir() or (not force and any(directory.iterdir()))):
        raise Refused(f"{directory} already exists: choose another --output, or --force.")
    stage = directory.absolute().with_name(f".{directory.name}.unverified")
    shutil.rmtree(stage, ignore_errors=True)  # of a command that was killed
    found = _fetch(service, path, stage, quiet)
    try:
        check(service.details(path), found)
    except Refused:
        shutil.rmtree(stage)
        raise
    _replace(stage, directory)
    return [directory / each.relative_to(stage) for each in found]


def _fetch(service: Service, path: str, directory: Path, quiet: bool) -> list[Path]:
    """Download with a progress bar for each file."""
    terminal = Console(stderr=True)
    off = quiet or not terminal.is_terminal
    columns = transfer_columns("{task.description}")
    with Progress(*columns, console=terminal, transient=True, disable=off) as bar:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        return download_checkpoint(service.client, path, directory, progress=show)


def _replace(stage: Path, directory: Path) -> None:
    """Put the complete download in place, and only then remove the previous one."""
    previous = directory.absolute().with_name(f".{directory.name}.before")
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)
    stage.rename(directory)
    sync_directory(directory.absolute().parent)
    shutil.rmtree(previous, ignore_errors=True)


def download_and_read(service: Service, path: str) -> VerifyCheckpointResponse:
    """Verify a checkpoint without hashes: download it and read every tensor."""
    listing.checkpoint(service.rest, path)
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
    """Compare the hashes of files with the manifest, if the service offers it.

    Raises:
        Refused: a hash differs.
    """
    known = {} if details is None else {each.name: each.blake3 for each in details.files}
    for file in files:
        expected = known.get(file.name)
        if expected is not None and _hash(file) != expected:
            raise Refused(
                f"The hash of the downloaded {file.name} is not the one that the service saved. "
                "The download was discarded; try again."
            )


def _hash(file: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
