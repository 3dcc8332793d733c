"""Helpers that save and load the checkpoints of the vault's tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from unittest import mock

from everstep.vault import FileRef, Manifest, Vault
from everstep.vault.storage import direct, local

RUN = "s:train:0"


def draft(
    name: str,
    files: Mapping[str, FileRef],
    *,
    kind: str = "training",
    run: str = RUN,
    step: int = 1,
) -> Manifest:
    """Return the manifest of a checkpoint with these files."""
    return Manifest(
        kind=kind,
        run_id=run,
        name=name,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        base_model="m",
        base_fingerprint="f",
        lora={"rank": 1, "note": "é\n"},
        optimizer=None,
        step=step,
        position=step,
        files=dict(files),
    )


def save(
    vault: Vault,
    name: str,
    contents: Mapping[str, bytes],
    *,
    kind: str = "training",
    run: str = RUN,
    step: int = 1,
    overwrite: bool = False,
) -> Manifest:
    """Save a checkpoint as a writer without a ledger does."""
    with vault.gc_paused(), vault.writing():
        files = {file: vault.put(halves(content)) for file, content in contents.items()}
        manifest = draft(name, files, kind=kind, run=run, step=step)
        vault.commit(manifest, overwrite=overwrite)
    return manifest


def save_at_once(
    vault: Vault,
    name: str,
    contents: Mapping[str, bytes],
    *,
    step: int = 1,
    overwrite: bool = False,
    cold: bool = False,
) -> Manifest:
    """Save a checkpoint as a worker does."""
    with vault.gc_paused(), vault.writing():
        return vault.save(
            {file: halves(content) for file, content in contents.items()},
            lambda files: draft(name, files, step=step),
            overwrite=overwrite,
            cold=cold,
        )


def load(vault: Vault, manifest: Manifest) -> dict[str, bytes]:
    """Return the verified content of each file of a checkpoint."""
    return {name: bytes(vault.read(manifest, name)) for name in manifest.files}


def halves(content: bytes) -> list[bytes]:
    """Split content into two chunks, either of which may be empty."""
    return [content[: len(content) // 2], content[len(content) // 2 :]]


@contextmanager
def written_directly(stage: int = 2 * direct.BLOCK) -> Iterator[None]:
    """Write cold files of any size directly, through stages of so many bytes."""
    with (
        mock.patch.object(local, "MIN_BYTES", 1),
        mock.patch.object(direct, "STAGE", stage),
        mock.patch.object(direct, "_unused", []),
    ):
        yield
