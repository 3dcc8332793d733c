"""Exports: a checkpoint's files, copied out of the vault under their own names."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from everstep.vault.keys import part
from everstep.vault.local import sync_directory, write_synced
from everstep.vault.manifest import Manifest

if TYPE_CHECKING:
    from everstep.vault.vault import Vault


def export(vault: Vault, manifest: Manifest, directory: Path) -> list[Path]:
    """Copy a checkpoint's files, durably; see `Vault.export`."""
    files = {directory / part(name): vault.read(manifest, name) for name in manifest.files}
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
