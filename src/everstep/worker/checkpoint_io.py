"""Checkpoint I/O: writes captured states as checkpoints and reads checkpoints' files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from everstep.durable_files import Buffer
from everstep.engine import Capture
from everstep.failpoints import Failpoint
from everstep.logs import get_logger
from everstep.vault import (
    CheckpointDamaged,
    CheckpointId,
    FileRef,
    Manifest,
    Vault,
    VaultError,
)
from everstep.vault.disk_guard import size_of
from everstep.vault.integrity import quarantining
from everstep.worker.encryption import SUFFIX, encrypted

_log = get_logger("everstep.worker")
ADAPTER_FILE = "adapter_model.safetensors"
_COLD = ("training", "snapshot")
"""Kinds of checkpoints that are read to go on from them. Others are sampled from, or downloaded."""
_COMMITTED = Failpoint("worker.save.committed", "a checkpoint is whole, the service has no reply")


@dataclass(frozen=True)
class Loaded:
    """What a run's state was loaded from, while it has not changed since.

    Attributes:
        files: the files that were verified and loaded, by name.
        diverged: whether a weight is NaN or infinite.
    """

    files: Mapping[str, FileRef]
    diverged: bool


def write_checkpoint(
    vault: Vault,
    capture: Capture,
    draft: Mapping[str, Any],
    environment: Mapping[str, Any],
    recipients: Sequence[str] = (),
    stored: Mapping[str, FileRef] | None = None,
) -> dict[str, Any]:
    """Write a captured state as a checkpoint, durably and atomically.

    Args:
        vault: where it goes.
        capture: the state. Released here, whatever happens.
        draft: the manifest's fields that the service knows.
        environment: the numeric environment that produced the state.
        recipients: age recipients that every file is encrypted for, if any.
        stored: files of the vault that hold the same state and were just verified. Those are
            named instead of written.

    Returns:
        ``size_bytes`` of all files and the ``step`` of the state.

    Raises:
        DiskFull: the disk has too little free space. Nothing of the checkpoint stays.
    """
    with vault.writing():
        try:
            capture.prepare()
            manifest = _written_before(vault, draft) if recipients else None
            if manifest is None:
                manifest = _save(
                    vault,
                    _contents(vault, capture, recipients, once=not stored),
                    partial(_manifest, draft, capture.meta, environment),
                    stored or {},
                    cold=draft["kind"] in _COLD,
                )
                _COMMITTED()
        finally:
            capture.release()
    return {"size_bytes": manifest.size, "step": manifest.step}


def _save(
    vault: Vault,
    contents: Mapping[str, Iterable[Buffer]],
    manifest_of: Callable[[dict[str, FileRef]], Manifest],
    stored: Mapping[str, FileRef],
    *,
    cold: bool,
) -> Manifest:
    """Save a checkpoint of contents, of which some are stored. The service has checked the name."""
    known = {name: ref for name, ref in stored.items() if name in contents}
    if known:
        try:
            new = {name: chunks for name, chunks in contents.items() if name not in known}
            return vault.save(new, manifest_of, stored=known, overwrite=True, cold=cold)
        except CheckpointDamaged as error:  # collected, or moved to quarantine, since it was read
            _log.warning("a loaded file is gone; the state is written again", reason=str(error))
    return vault.save(contents, manifest_of, overwrite=True, cold=cold)


def _contents(
    vault: Vault, capture: Capture, recipients: Sequence[str], *, once: bool
) -> Mapping[str, Iterable[Buffer]]:
    """Return a captured state's files. Encrypted if there are recipients."""
    contents = capture.files(once=once)
    if not recipients:
        return contents
    vault.check_free_space(sum(size_of(chunks) or 0 for chunks in contents.values()))
    return {name + SUFFIX: encrypted(chunks, recipients) for name, chunks in contents.items()}


def _written_before(vault: Vault, draft: Mapping[str, Any]) -> Manifest | None:
    """The checkpoint that this same operation wrote before a crash kept it from being recorded.

    Encryption never gives the same bytes twice, and a reader of the first must not find others.
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
    draft: Mapping[str, Any],
    meta: Mapping[str, Any],
    environment: Mapping[str, Any],
    files: dict[str, FileRef],
) -> Manifest:
    expires_at = draft["expires_at"]
    return Manifest(
        **{
            **draft,
            "expires_at": datetime.fromisoformat(expires_at) if expires_at else None,
            "created_at": datetime.now(UTC),
            "step": int(meta["step"]),
            "diverged": meta.get("diverged", False),
            "zero_moments": meta.get("zero_moments", False),
            "rng": {},  # training draws no random numbers; a sample carries its own seed
            "environment": dict(environment),
            "files": files,
        }
    )


def read_checkpoint(
    vault: Vault, source: CheckpointId, optimizer: bool
) -> tuple[Manifest, dict[str, memoryview]]:
    """Read a checkpoint's verified files. One that is damaged is moved to quarantine.

    Args:
        vault: where it lies.
        source: the checkpoint or snapshot.
        optimizer: whether the optimizer's files are wanted as well.

    Raises:
        VaultError: it is absent or damaged. The text names the file.
    """
    with quarantining(vault):
        manifest = vault.manifest(*source)
        wanted = manifest.files if optimizer else [ADAPTER_FILE]
        return manifest, {name: vault.read(manifest, name) for name in wanted}
