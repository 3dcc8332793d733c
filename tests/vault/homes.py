"""A home as a service leaves it, made without one: runs, checkpoints, snapshots and their rows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from everstep.ledger import Checkpoint, Ledger, NewOperation, Run
from everstep.runtime.checkpoints import path_of
from everstep.vault import CheckpointId, Manifest, Vault
from tests.vault.checkpoints import draft

RUN = "session:train:0"
OPTIMIZER = {"type": "adamw"}
LORA = {"rank": 1}
OPERATIONS = {"training": "save_weights", "sampler": "save_weights_for_sampler"}


class Home:
    """A home directory; each method does what a service would have done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.vault = Vault(path / "vault")
        self.seq = 0
        self.ledger(self._create_run)

    def ledger(self, work: Any) -> Any:
        """Call a coroutine function with the open ledger."""

        async def run() -> Any:
            ledger = await Ledger.open(self.path / "ledger.sqlite")
            try:
                return await work(ledger)
            finally:
                await ledger.close()

        return asyncio.run(run())

    async def _create_run(self, ledger: Ledger) -> None:
        now = datetime.now(UTC)
        run = Run(RUN, "session", "m", LORA, OPTIMIZER, {}, now, now)
        await ledger.accept(NewOperation(RUN, 0, "create_model", b"{}"), run=run)

    def save(
        self,
        name: str,
        content: bytes,
        *,
        kind: str = "training",
        expires_in: float | None = None,
        record: bool = True,
        metadata: dict[str, str] | None = None,
    ) -> Manifest:
        """A save; without ``record`` the service died before it told the ledger."""
        self.seq += 1
        seq = self.seq

        async def work(ledger: Ledger) -> Manifest:
            payload = json.dumps({"name": name}).encode()
            new = NewOperation(RUN, seq, OPERATIONS[kind], payload)
            operation, _ = await ledger.accept(new)
            manifest = self.write(name, content, kind, seq, operation.request_id, metadata)
            if record:
                row = row_of(manifest, expires_in)
                await ledger.succeed(operation.request_id, b"{}", "json", checkpoint=row)
            return manifest

        manifest: Manifest = self.ledger(work)
        return manifest

    def write(
        self,
        name: str,
        content: bytes,
        kind: str,
        seq: int,
        request_id: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Manifest:
        """What the worker writes."""
        with self.vault.pinned():
            files = {"adapter": self.vault.put([content]), "config": self.vault.put([b"config"])}
            manifest = draft(name, files, kind=kind, run=RUN, step=seq).model_copy(
                update={
                    "created_at": datetime.now(UTC),
                    "request_id": request_id,
                    "lora": LORA,
                    "optimizer": None if kind == "sampler" else OPTIMIZER,
                    "user_metadata": metadata,
                }
            )
            self.vault.commit(manifest, overwrite=True)
        return manifest

    def snapshot(self, content: bytes) -> Manifest:
        """A snapshot at the run's last operation."""
        return self.write(f"{self.seq:020d}", content, "snapshot", self.seq)

    def blob(self, manifest: Manifest, file: str = "adapter") -> Path:
        """Where a file lies."""
        digest = manifest.files[file].blake3
        return self.path / "vault" / "blobs" / digest[:2] / digest

    def listed(self) -> list[str]:
        """Names of the run's listed checkpoints, oldest first."""

        async def work(ledger: Ledger) -> list[str]:
            return [row.name for row in await ledger.checkpoints(RUN)]

        found: list[str] = self.ledger(work)
        return found


def row_of(manifest: Manifest, expires_in: float | None = None) -> Checkpoint:
    """The row of a checkpoint."""
    path = path_of(CheckpointId(*manifest.id))
    assert path is not None
    delta = None if expires_in is None else timedelta(seconds=expires_in)
    return Checkpoint(
        path=path,
        run_id=manifest.run_id,
        kind=manifest.kind,
        name=manifest.name,
        created_at=manifest.created_at,
        size_bytes=manifest.size,
        base_model=manifest.base_model,
        lora=manifest.lora,
        optimizer=manifest.optimizer,
        user_metadata=manifest.user_metadata,
        expires_at=None if delta is None else datetime.now(UTC) + delta,
    )


def rot(path: Path) -> None:
    """Flip one bit of a file in place, as a disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine."""
    return asyncio.run(work)
