"""Workload: a program that uses a vault and a ledger like the service, and reports each step.

It saves, overwrites, forks, deletes and collects checkpoints, also concurrently, and accepts and
ends operations, singly and in groups. Its actions follow from a seed and from the contents of the
home at its start. It imports nothing slow.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from everstep.ledger import Checkpoint, Ledger, NewOperation
from everstep.ledger.payload_log.contents import LOGGED_BYTES
from everstep.testing import faulty
from everstep.testing.history import Reporter, Value
from everstep.testing.invariants import (
    LEDGER,
    RUNS,
    VAULT,
    describe,
    digest,
    draft,
    operation_of,
    operation_value,
    row_of,
    row_value,
    thing_of,
)
from everstep.vault import CheckpointId, FileRef, Manifest, Vault, gc
from everstep.vault.pins import Pins

_NAMES = ("a", "b", "c")
_KINDS = ("training", "sampler")
_PIN_TIMEOUT = 60.0
_SHARED = (b"the same config", b"", b"shared" * 3000)


def live(
    events: int,
    home: str,
    seed: int,
    steps: int,
    *,
    pause_after: int | None = None,
    pause_on: str = "",
    hang_at_call: int | None = None,
    forget_fsync: faulty.Sort | None = None,
) -> None:
    """Run the workload.

    Args:
        events: file descriptor for the reports.
        home: holds ``vault`` and ``ledger.sqlite``.
        seed: determines the actions.
        steps: number of actions.
        pause_after: hang after this many acknowledgements.
        pause_on: count only acknowledgements of things whose names begin like this.
        hang_at_call: hang before this system call that changes the vault.
        forget_fsync: skip fsyncs of files or directories, to show that this is noticed.
    """
    reporter = Reporter(events, pause_after, pause_on)
    try:
        with ExitStack() as stack:
            if forget_fsync is not None:
                stack.enter_context(faulty.without_fsync(forget_fsync))
            if hang_at_call is not None:
                stack.enter_context(_hanging(Path(home), hang_at_call, reporter))
            asyncio.run(Workload(Path(home), seed, reporter).run(steps))
    except Exception as error:  # noqa: BLE001  after a power cut anything fails; it is reported
        reporter.report(crashed=repr(error))
    else:
        reporter.report(done=True)


@contextmanager
def _hanging(home: Path, nth: int, reporter: Reporter) -> Iterator[None]:
    def before(_name: str, _path: Path) -> None:
        if calls.count == nth:
            reporter.hang()

    calls = faulty.Calls(home, before)
    with calls:
        yield


class Workload:
    """The program.

    Args:
        home: its home.
        seed: of what it does.
        reporter: receives the reports.
    """

    def __init__(self, home: Path, seed: int, reporter: Reporter) -> None:
        self._home = home
        self._chance = random.Random(seed)
        self._reporter = reporter
        self._next = dict.fromkeys(RUNS, 0)
        self._pins = Pins()

    async def run(self, steps: int) -> None:
        """Open the home, run some actions, close it."""
        self._home.mkdir(exist_ok=True)
        self._ledger = await Ledger.open(self._home / LEDGER)
        self._vault = await asyncio.to_thread(Vault, self._home / VAULT)
        for scope in RUNS:
            known = await self._ledger.operations(scope)
            self._next[scope] = 1 + max((each.seq_id for each in known), default=-1)
        work = [self._accept, self._save, self._save_and_collect, self._fork, self._delete]
        for _ in range(steps):
            await self._chance.choices(work, (3, 5, 2, 1, 2))[0]()
        await self._ledger.close()

    # The ledger

    async def _accept(self) -> None:
        """Accept a few operations at once. Each of them may end."""
        scope = self._chance.choice(RUNS)
        payloads = [self._bytes(400) for _ in range(self._chance.randint(1, 3))]
        ids = await asyncio.gather(*[self._accept_one(scope, each) for each in payloads])
        for seq_id, request_id, payload in ids:
            if self._chance.random() < 0.7:
                await self._succeed(scope, seq_id, request_id, payload)

    async def _accept_one(self, scope: str, payload: bytes) -> tuple[int, str, bytes]:
        seq_id = self._next[scope]
        self._next[scope] += 1
        thing = operation_of(scope, seq_id)
        value = {"payload": digest(payload), "status": "pending"}
        new = NewOperation(scope, seq_id, "step", payload)
        with self._reporter.doing({thing: value}) as after:
            operation, _ = await self._ledger.accept(new)
            after[thing] = operation_value(operation)
        again, is_new = await self._ledger.accept(new)
        if is_new or again.request_id != operation.request_id:
            self._reporter.report(broken=f"{thing} was accepted twice")
        return seq_id, operation.request_id, payload

    async def _succeed(
        self,
        scope: str,
        seq_id: int,
        request_id: str,
        payload: bytes,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        result = self._bytes(900)
        changes: dict[str, Value] = {
            operation_of(scope, seq_id): {
                "request_id": request_id,
                "payload": digest(payload),
                "status": "succeeded",
                "result": digest(result),
            }
        }
        if checkpoint is not None:
            changes[row_of(checkpoint.path)] = row_value(checkpoint)
        with self._reporter.doing(changes):
            await self._ledger.succeed(request_id, result, "json", checkpoint=checkpoint)

    # Checkpoints

    async def _save(self) -> None:
        """Save like the service: accept, pin, write, commit, record."""
        checkpoint = self._checkpoint()
        contents = {"adapter": self._content(), "config": self._chance.choice(_SHARED)}
        payload = self._bytes(100)
        seq_id, request_id, _ = await self._accept_one(checkpoint.run_id, payload)

        def write() -> int:
            with self._pins.held(), self._vault.writing(), ExitStack() as saving:

                def manifest_of(files: dict[str, FileRef]) -> Manifest:
                    manifest = draft(checkpoint, files, step=seq_id)
                    value = describe(manifest, contents)
                    saving.enter_context(self._reporter.doing({thing_of(checkpoint): value}))
                    return manifest

                halves = {k: [each[:1000], each[1000:]] for k, each in contents.items()}
                return self._vault.save(halves, manifest_of, overwrite=True).size

        size = await asyncio.to_thread(write)
        row = _row(checkpoint, size)
        await self._succeed(checkpoint.run_id, seq_id, request_id, payload, row)

    async def _save_and_collect(self) -> None:
        """Collect during a save, and again after it."""
        await asyncio.gather(self._collect(), self._save())
        await self._collect()

    async def _collect(self) -> None:
        pins_ended = partial(self._pins.wait, _PIN_TIMEOUT)
        await asyncio.to_thread(gc.collect, self._vault, 0, pins_ended=pins_ended)

    async def _fork(self) -> None:
        """Commit a checkpoint of another one's files."""
        known = list(self._vault.manifests())
        if not known:
            return
        source = self._chance.choice(known)
        checkpoint = CheckpointId("snapshot", self._chance.choice(RUNS), f"{source.step % 4}")
        manifest = draft(checkpoint, source.files, step=source.step)
        contents = {name: self._vault.read(source, name) for name in source.files}
        with self._reporter.doing({thing_of(checkpoint): describe(manifest, contents)}):
            await asyncio.to_thread(self._vault.commit, manifest, overwrite=True)

    async def _delete(self) -> None:
        """Delete a checkpoint from the index, then from the vault."""
        checkpoint = self._checkpoint()
        path = _row(checkpoint, 0).path
        with self._reporter.doing({row_of(path): None}):
            await self._ledger.delete_checkpoint(path)
        with self._reporter.doing({thing_of(checkpoint): None}):
            await asyncio.to_thread(self._vault.delete, *checkpoint)

    # Parameters

    def _checkpoint(self) -> CheckpointId:
        chance = self._chance
        return CheckpointId(chance.choice(_KINDS), chance.choice(RUNS), chance.choice(_NAMES))

    def _content(self) -> bytes:
        if self._chance.random() < 0.3:
            return self._chance.choice(_SHARED)
        return self._chance.randbytes(self._chance.choice((10, 3000, 4096, 50_000)))

    def _bytes(self, longest: int) -> bytes:
        """Return a request or result: a small one, or one that the payload log keeps."""
        size = self._chance.choice((LOGGED_BYTES, self._chance.randrange(longest)))
        return uuid.uuid4().bytes + self._chance.randbytes(size)


Step = tuple[str, str, bytes]
"""A step of `run_steps`: action, checkpoint and content."""


def run_steps(vault: Vault, steps: Iterable[Step], reporter: Reporter, *, first: int = 0) -> None:
    """Run given steps on a vault, without a ledger, in this process.

    Args:
        vault: the vault.
        steps: each ``save``, ``fork``, ``delete`` or ``collect``.
        reporter: receives the reports.
        first: the number of the first step.
    """
    for number, (what, name, content) in enumerate(steps, first):
        checkpoint = CheckpointId("training", RUNS[0], name)
        known = [each for each in vault.manifests() if what == "fork"]
        if what == "collect":
            gc.collect(vault, 0)
        elif what == "delete":
            with reporter.doing({thing_of(checkpoint): None}):
                vault.delete(*checkpoint)
        elif what == "save" or known:
            taken = [*vault.names(checkpoint.kind, checkpoint.run_id)]
            with vault.gc_paused():
                if what == "save":
                    files = {"adapter": vault.put([content]), "config": vault.put([b"shared"])}
                    contents: dict[str, Any] = {"adapter": content, "config": b"shared"}
                else:
                    files = dict(known[0].files)
                    contents = {file: vault.read(known[0], file) for file in files}
                manifest = draft(checkpoint, files, step=number)
                with reporter.doing({thing_of(checkpoint): describe(manifest, contents)}):
                    vault.commit(manifest, overwrite=(checkpoint.run_id, name) in taken)


def _row(checkpoint: CheckpointId, size: int) -> Checkpoint:
    kind, run, name = checkpoint
    path = f"tinker://{run}/{'weights' if kind == 'training' else 'sampler_weights'}/{name}"
    details: dict[str, Any] = {"lora": {"rank": 1}, "optimizer": None, "user_metadata": None}
    return Checkpoint(
        path=path,
        run_id=run,
        kind=kind,
        name=name,
        created_at=datetime.now(UTC),
        size_bytes=size,
        base_model="m",
        expires_at=None,
        **details,
    )
