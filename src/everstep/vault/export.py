"""Export: copies a checkpoint's files out of the vault, under their own names.

<directory>              whole or absent
.<directory>.part        the files while they are written. The next attempt empties it
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from everstep.durable_files import sync_directory, sync_tree, write_new
from everstep.vault.errors import VaultBusy, VaultError
from everstep.vault.manifest import Manifest
from everstep.vault.storage.keys import part
from everstep.vault.vault import Vault


def export(
    vault: Vault, manifest: Manifest, directory: Path, *, only: Container[str] | None = None
) -> list[Path]:
    """Copy a checkpoint's files durably under their own names. Copies none unless all verify.

    Args:
        vault: the vault.
        manifest: the checkpoint.
        directory: created if needed. Files of the same names are replaced.
        only: names of the wanted files, None for all.

    Returns:
        The files.

    Raises:
        CheckpointDamaged: a file is missing, or not as written. Nothing was copied.
    """
    names = [name for name in manifest.files if only is None or name in only]
    files = {directory / part(name): vault.read(manifest, name) for name in names}
    directory.mkdir(parents=True, exist_ok=True)
    for target, content in files.items():
        temporary = directory / f".{uuid.uuid4().hex}"
        try:
            write_new(temporary, [content])
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(directory)
    return list(files)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yield a directory to write into that becomes the target: whole, durable, at once.

    If writing fails, or the process dies, there is no target.

    Args:
        target: must not exist, or be empty.

    Raises:
        VaultError: the target exists already.
        VaultBusy: another process is writing it.
        OSError: a file can't be written. An error without a filename names the target.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise VaultError(f"{target} exists already and is not empty; choose another directory.")
    stage = target.with_name(f".{target.name}.part")
    stage.mkdir(parents=True, exist_ok=True)
    handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _take(handle, stage)
        try:
            yield stage
            sync_tree(stage)
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
    """Lock a stage, and remove files that a process that died left in it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = stage.exists() and os.path.samestat(os.fstat(handle), stage.stat())
    except BlockingIOError:
        mine = False
    if not mine:
        raise VaultBusy(f"Another command is writing {stage}; wait for it.")
    for leftover in stage.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
