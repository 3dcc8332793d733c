"""Exports: a checkpoint's files, copied out of the vault under their own names.

<directory>              whole, or not there
.<directory>.part        beside it, what is being written; the next attempt empties it
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from everstep.vault.errors import VaultBusy, VaultError
from everstep.vault.keys import part
from everstep.vault.local import sync_directory, write_synced
from everstep.vault.manifest import Manifest

if TYPE_CHECKING:
    from everstep.vault.vault import Vault


def export(
    vault: Vault, manifest: Manifest, directory: Path, only: Container[str] | None
) -> list[Path]:
    """Copy a checkpoint's files, durably; see `Vault.export`."""
    names = [name for name in manifest.files if only is None or name in only]
    files = {directory / part(name): vault.read(manifest, name) for name in names}
    directory.mkdir(parents=True, exist_ok=True)
    for target, content in files.items():
        temporary = directory / f".{uuid.uuid4().hex}"
        try:
            write_synced(temporary, [content])
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(directory)
    return list(files)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Give a directory to write into, which becomes the target: whole, durable, at once.

    Where the writing fails, or its process dies, there is no target.

    Args:
        target: must not exist, or be empty.

    Raises:
        VaultError: something is there already.
        VaultBusy: another process is writing it.
        OSError: a file can't be written; which says the target, where it says nothing itself.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise VaultError(f"{target} is there already, and not empty; choose another directory.")
    stage = target.with_name(f".{target.name}.part")
    stage.mkdir(parents=True, exist_ok=True)
    handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _take(handle, stage)
        try:
            yield stage
            _sync_tree(stage)
            stage.rename(target)  # an empty directory gives way
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if isinstance(error, OSError) and error.filename is None:  # as of a full disk
                error.filename = str(target)
            raise
        sync_directory(target.parent)
    finally:
        os.close(handle)


def _take(handle: int, stage: Path) -> None:
    """Have a stage to oneself, without what a process that died left in it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = stage.exists() and os.path.samestat(os.fstat(handle), stage.stat())
    except BlockingIOError:
        mine = False
    if not mine:
        raise VaultBusy(f"Another command is writing {stage}; wait for it.")
    for leftover in stage.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            handle = os.open(Path(directory) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(directory))
