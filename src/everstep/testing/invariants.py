"""Invariants of an Everstep home, after any fault: of its vault and its ledger.

`find` returns the state of a home as values of a `history`. `check` compares it with the history,
and checks further invariants: each row of the ledger has its checkpoint, verification and SQLite
find no damage, a collection keeps exactly the files that are needed, and the home still works.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from everstep.ledger import Checkpoint, Ledger, LedgerDamaged, LedgerError, NewOperation, Operation
from everstep.ledger.sqlite.copy import check_database
from everstep.testing.history import History, Value, Violation
from everstep.vault import CheckpointId, Manifest, Vault, VaultError, gc
from everstep.vault.storage.keys import BLOBS, KINDS, digest_of
from everstep.vault.verify import verify

RUNS = ("run:0", "run:1")
VAULT, LEDGER = "vault", "ledger.sqlite"
Found = dict[str, Value]


def digest(data: bytes | memoryview) -> str:
    """Return a hash that differs from the vault's."""
    return hashlib.sha256(data).hexdigest()[:24]


def thing_of(checkpoint: CheckpointId) -> str:
    """Return a checkpoint's name in a history."""
    return f"vault:{checkpoint}"


def row_of(path: str) -> str:
    """Return the name of an index row in a history."""
    return f"row:{path}"


def operation_of(scope: str, seq_id: int) -> str:
    """Return an operation's name in a history."""
    return f"operation:{scope}/{seq_id}"


def describe(manifest: Manifest, contents: Mapping[str, bytes | memoryview]) -> Value:
    """Return a checkpoint as a value of a history."""
    files = {f"file {name}": digest(content) for name, content in contents.items()}
    return {"step": manifest.step, **files}


def find(home: Path) -> Found:
    """Return the state of a home, opened as after a restart."""
    return {**find_in_vault(Vault(home / VAULT)), **asyncio.run(find_in_ledger(home / LEDGER))}


def find_in_vault(vault: Vault) -> Found:
    """Return every listed checkpoint, read to the last byte."""
    found: Found = {}
    for kind in KINDS:
        for run, name in vault.names(kind):
            checkpoint = CheckpointId(kind, run, name)
            try:
                manifest = vault.manifest(*checkpoint)
                contents = {file: vault.read(manifest, file) for file in manifest.files}
                found[thing_of(checkpoint)] = describe(manifest, contents)
            except VaultError as error:
                found[thing_of(checkpoint)] = {"damaged": str(error)}
    return found


async def find_in_ledger(path: Path) -> Found:
    """Return every operation and every row of the index."""
    found: Found = {}
    ledger = await Ledger.open(path)
    try:
        reads = [ledger.operations(scope, contents=False) for scope in RUNS]
        operations, rows = await asyncio.gather(asyncio.gather(*reads), ledger.all_checkpoints())
        for bare in itertools.chain.from_iterable(operations):
            name = operation_of(bare.scope, bare.seq_id)
            try:
                found[name] = operation_value(await ledger.contents.fill(bare))
            except LedgerDamaged as error:
                found[name] = {"damaged": str(error)}
    finally:
        await ledger.close()
    for row in rows:
        found[row_of(row.path)] = row_value(row)
    return found


def operation_value(operation: Operation) -> Value:
    """Return an operation as a value of a history."""
    value: dict[str, Any] = {
        "request_id": operation.request_id,
        "payload": digest(operation.payload),
        "status": operation.status,
    }
    if operation.result is not None:
        value["result"] = digest(operation.result)
    return value


def row_value(row: Checkpoint) -> Value:
    """Return an index row as a value of a history."""
    return {"kind": row.kind, "run": row.run_id, "name": row.name, "size": row.size_bytes}


def check(home: Path, history: History, *, thorough: bool = True) -> tuple[list[Violation], Found]:
    """Compare a home with its history, and check that it still works.

    Args:
        home: holds ``vault`` and ``ledger.sqlite``.
        history: the reports of the programs that used it.
        thorough: also verify, collect, and write something new.

    Returns:
        The violations, and the state that was found.
    """
    found: Found = {}
    wrong = []
    try:
        found = find(home)
        wrong += history.judge(found)
        wrong += _rows_without_checkpoint(found)
        if thorough and not wrong:  # a damaged home is not to be changed
            wrong += _sqlite_damage(home)
            wrong += _upkeep(home / VAULT, found)
            if not asyncio.run(_accepts(home / LEDGER)):
                wrong.append(Violation("nothing new is accepted", LEDGER, "it is not there"))
    except (OSError, VaultError, LedgerError) as error:
        wrong.append(Violation("it can't be used", str(home), repr(error)))
    return wrong, found


def check_vault(root: Path, history: History) -> tuple[list[Violation], Found]:
    """Like `check`, for a vault without a ledger.

    Args:
        root: the vault's directory.
        history: the reports of the programs that used it.
    """
    found: Found = {}
    try:
        found = find_in_vault(Vault(root))
        wrong = history.judge(found)
        if not wrong:
            wrong += _upkeep(root, found)
    except (OSError, VaultError) as error:
        wrong = [Violation("it can't be used", str(root), repr(error))]
    return wrong, found


def _rows_without_checkpoint(found: Found) -> Iterator[Violation]:
    """Check that each indexed checkpoint exists: it is indexed after, and removed before it."""
    for thing, row in found.items():
        if row is not None and thing.startswith("row:"):
            checkpoint = thing_of(CheckpointId(row["kind"], row["run"], row["name"]))
            if found.get(checkpoint) is None:
                yield Violation("in the ledger, not in the vault", thing, f"no {checkpoint}")


def _sqlite_damage(home: Path) -> Iterator[Violation]:
    try:
        check_database(home / LEDGER)
    except LedgerError as error:
        yield Violation("SQLite finds damage", LEDGER, str(error))


def _upkeep(root: Path, found: Found) -> Iterator[Violation]:
    """Check that the home can be verified and collected, and takes a new save."""
    vault = Vault(root)
    for damage in verify(vault, everything=True).damaged:
        yield Violation("verification finds damage", damage.key, damage.reason)
    yield from _collection(vault, found)
    probe = CheckpointId("sampler", "probe", "probe")
    with vault.gc_paused():
        files = {"adapter": vault.put([b"probe"])}
        vault.commit(draft(probe, files, step=0), overwrite=True)
    if bytes(vault.read(vault.manifest(*probe), "adapter")) != b"probe":
        yield Violation("nothing new can be saved", thing_of(probe), "it reads otherwise")
    vault.delete(*probe)


def _collection(vault: Vault, found: Found) -> Iterator[Violation]:
    """Check that a collection keeps exactly the reachable files."""
    gc.collect(vault, 0)
    after = find_in_vault(vault)
    for thing, value in found.items():
        if thing.startswith("vault:") and value != after.get(thing):
            yield Violation("collected, and needed", thing, f"{after.get(thing)}, was {value}")
    needed = {ref.blake3 for each in vault.read_manifests() for ref in each.files.values()}
    for key in vault.storage.keys(BLOBS):
        if digest_of(key) not in needed:
            yield Violation("left by a collection", key, "no checkpoint names it")
    for key in vault.storage.keys("tmp/"):
        yield Violation("left by a crash", key, "nobody needs it")


async def _accepts(path: Path) -> bool:
    ledger = await Ledger.open(path)
    try:
        new = NewOperation("probe", await _next(ledger, "probe"), "probe", b"probe")
        operation, _ = await ledger.accept(new)
        known, is_new = await ledger.accept(new)
        return known == operation and not is_new
    finally:
        await ledger.close()


async def _next(ledger: Ledger, scope: str) -> int:
    return 1 + max((each.seq_id for each in await ledger.operations(scope)), default=-1)


def draft(checkpoint: CheckpointId, files: Mapping[str, Any], *, step: int) -> Manifest:
    """Return the manifest of a checkpoint for a test."""
    return Manifest(
        kind=checkpoint.kind,
        run_id=checkpoint.run_id,
        name=checkpoint.name,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        base_model="m",
        base_fingerprint="f",
        lora={"rank": 1},
        optimizer=None,
        step=step,
        position=step,
        files=dict(files),
    )
