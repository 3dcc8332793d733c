"""Between engine and vault: a captured state becomes a checkpoint, a checkpoint becomes files."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from everstep.engine import Capture
from everstep.vault import FileRef, Manifest, Vault
from everstep.vault.inspection import quarantining
from everstep.vault.room import size_of

ADAPTER_FILE = "adapter_model.safetensors"


def write_checkpoint(
    vault: Vault,
    capture: Capture,
    draft: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a captured state and make it appear, durably and at once.

    Args:
        vault: where it goes.
        capture: the state; released here, whatever happens.
        draft: the manifest's fields that the service knows.
        environment: the numeric environment that produced the state.

    Returns:
        ``size_bytes`` of all files and the ``step`` of the state.

    Raises:
        DiskFull: there is no room for all of it; nothing was written, or nothing of it stays.
    """
    with vault.pinned():
        try:
            contents = capture.files()
            vault.check_room(sum(size_of(chunks) or 0 for chunks in contents.values()))
            files = {name: vault.put(chunks) for name, chunks in contents.items()}
        finally:
            capture.release()
        manifest = _manifest(draft, int(capture.meta["step"]), environment, files)
        vault.commit(manifest, overwrite=True)  # the service has settled whether the name is free
    return {"size_bytes": manifest.size, "step": manifest.step}


def _manifest(
    draft: Mapping[str, Any], step: int, environment: Mapping[str, Any], files: dict[str, FileRef]
) -> Manifest:
    expires_at = draft["expires_at"]
    return Manifest(
        **{
            **draft,
            "expires_at": datetime.fromisoformat(expires_at) if expires_at else None,
            "created_at": datetime.now(UTC),
            "step": step,
            "rng": {},  # training draws no random numbers; a sample carries its own seed
            "environment": dict(environment),
            "files": files,
        }
    )


def read_checkpoint(
    vault: Vault, source: Mapping[str, Any], optimizer: bool
) -> tuple[Manifest, dict[str, memoryview]]:
    """Read a checkpoint's verified files. One that is damaged is moved to quarantine.

    Args:
        vault: where it lies.
        source: ``kind``, ``run`` and ``name``.
        optimizer: whether the optimizer's files are wanted as well.

    Raises:
        VaultError: it is absent or damaged; the text names the file.
    """
    with quarantining(vault):
        manifest = vault.manifest(source["kind"], source["run"], source["name"])
        wanted = manifest.files if optimizer else [ADAPTER_FILE]
        return manifest, {name: vault.read(manifest, name) for name in wanted}
