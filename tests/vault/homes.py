"""Home builder: creates the runs, checkpoints and ledger rows of a service without starting one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from everstep.ledger import Checkpoint, Ledger, NewOperation, Run
from everstep.runtime import Settings
from everstep.runtime.authorization import Authorization
from everstep.runtime.checkpoints.catalog import CheckpointCatalog
from everstep.runtime.context import RuntimeContext
from everstep.runtime.workers.local_process import SpawnLauncher
from everstep.runtime.workers.supervisor import SupervisedPool
from everstep.vault import Manifest, Vault
from tests.vault.checkpoints import draft

RUN = "session:train:0"
OPTIMIZER = {"type": "adamw"}
LORA = {"rank": 1}
OPERATIONS = {"training": "save_weights", "sampler": "save_weights_for_sampler"}


class Home:
    """A home directory. Each method writes the files and rows that a service would write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        self.vault = Vault(path / "vault")
        self.seq = 0
        self.ledger(self._create_run)

    def ledger(self, work: Any) -> Any:
        """Call a coroutine function with the open ledger and return its result."""

        async def run() -> Any:
            ledger = await Ledger.open(self.path / "ledger.sqlite")
            try:
                return await work(ledger)
            finally:
                await ledger.close()

        return asyncio.run(run())

    def context(self, ledger: Ledger) -> RuntimeContext:
        """The parts of a service on this home. Its worker is not started."""
        settings = Settings()
        workers = SupervisedPool(SpawnLauncher({}), settings.hang_seconds)
        catalog = CheckpointCatalog(ledger, self.vault, settings)
        access = Authorization(ledger)
        return RuntimeContext(self.path, ledger, self.vault, workers, catalog, settings, access)

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
        """Save a checkpoint. Without ``record``, as if the service died before it wrote the row."""
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
        """Write the files and the manifest of a checkpoint, as the worker does."""
        with self.vault.gc_paused():
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
        """Write a snapshot at the run's last operation."""
        return self.write(f"{self.seq:020d}", content, "snapshot", self.seq)

    def blob(self, manifest: Manifest, file: str = "adapter") -> Path:
        """Return the path of a checkpoint's file in the vault."""
        digest = manifest.files[file].blake3
        return self.path / "vault" / "blobs" / digest[:2] / digest

    def listed(self) -> list[str]:
        """Return the names of the run's listed checkpoints, oldest first."""

        async def work(ledger: Ledger) -> list[str]:
            return [row.name for row in await ledger.checkpoints(RUN)]

        found: list[str] = self.ledger(work)
        return found


def row_of(manifest: Manifest, expires_in: float | None = None) -> Checkpoint:
    """Return the ledger row of a checkpoint."""
    delta = None if expires_in is None else timedelta(seconds=expires_in)
    return Checkpoint(
        path=manifest.id.path,
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
    """Flip one bit of a file in place, as bit rot does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine and return its result."""
    return asyncio.run(work)
