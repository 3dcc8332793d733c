"""Between engine and vault: a captured state becomes a checkpoint, a checkpoint becomes files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from everstep.engine import Capture
from everstep.failpoints import Failpoint
from everstep.runtime.encryption import SUFFIX, encrypted
from everstep.vault import FileRef, Manifest, Vault, VaultError
from everstep.vault.inspection import quarantining
from everstep.vault.room import size_of

ADAPTER_FILE = "adapter_model.safetensors"
_COMMITTED = Failpoint("worker.save.committed", "a checkpoint is whole, the service was not told")


def write_checkpoint(
    vault: Vault,
    capture: Capture,
    draft: Mapping[str, Any],
    environment: Mapping[str, Any],
    recipients: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a captured state and make it appear, durably and at once.

    Args:
        vault: where it goes.
        capture: the state; released here, whatever happens.
        draft: the manifest's fields that the service knows.
        environment: the numeric environment that produced the state.
        recipients: for whom every file is encrypted; none: not at all.

    Returns:
        ``size_bytes`` of all files and the ``step`` of the state.

    Raises:
        DiskFull: there is no room for all of it; nothing was written, or nothing of it stays.
    """
    with vault.pinned():
        try:
            manifest = _written_before(vault, draft) if recipients else None
            if manifest is None:
                files = _put(vault, capture, recipients)
        finally:
            capture.release()
        if manifest is None:
            manifest = _manifest(draft, int(capture.meta["step"]), environment, files)
            vault.commit(manifest, overwrite=True)  # the service settled whether the name is free
            _COMMITTED()
    return {"size_bytes": manifest.size, "step": manifest.step}


def _put(vault: Vault, capture: Capture, recipients: Sequence[str]) -> dict[str, FileRef]:
    """Store a captured state's files; encrypted if there are recipients."""
    contents = capture.files()
    vault.check_room(sum(size_of(chunks) or 0 for chunks in contents.values()))
    if not recipients:
        return {name: vault.put(chunks) for name, chunks in contents.items()}
    return {
        name + SUFFIX: vault.put(encrypted(chunks, recipients)) for name, chunks in contents.items()
    }


def _written_before(vault: Vault, draft: Mapping[str, Any]) -> Manifest | None:
    """What this very operation wrote before a crash kept it from being recorded.

    Encryption never gives the same bytes twice: whoever saw them must not find others.
    """
    try:
        manifest = vault.manifest(draft["kind"], draft["run_id"], draft["name"])
        if manifest.request_id != draft["request_id"]:
            return None
        for name in manifest.files:
            vault.read(manifest, name)
    except VaultError:
        return None
    return manifest


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
