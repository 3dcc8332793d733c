"""Full disk, by bytes or by inodes: clear errors, no leftovers, and work continues afterwards."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.ledger import Ledger, LedgerDamaged, LedgerError, NewOperation, NotWritten
from everstep.testing.crashfs import CrashFS, scratch
from everstep.testing.devices import why_not
from everstep.testing.history import History, Reporter
from everstep.testing.invariants import LEDGER, find_in_vault
from everstep.testing.workload import run_steps
from everstep.vault import CheckpointId, DiskFull, Vault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
MANY = 1000


def until_full(save: Callable[[int], None]) -> int:
    """Save until the disk is full and return the number of saves."""
    for number in range(MANY):
        try:
            save(number)
        except DiskFull as error:
            assert "room" in str(error) or "full" in str(error)
            return number
    raise AssertionError("the disk did not fill up")


@pytest.mark.parametrize(
    ("mkfs", "size"), [((), 300_000), (("-N", "64"), 10)], ids=["bytes", "inodes"]
)
def test_saves_fail_cleanly_on_a_full_disk_and_work_afterwards(
    mkfs: tuple[str, ...], size: int
) -> None:
    chance = random.Random(1)
    contents = [chance.randbytes(size) for _ in range(MANY if size < 1000 else 60)]
    with CrashFS(scratch(), mkfs=mkfs) as disk:
        vault = Vault(disk.root / "vault")
        lines: list[bytes] = []
        reporter = Reporter(lines.append)

        def save(number: int) -> None:
            run_steps(vault, [("save", f"s{number}", contents[number])], reporter)

        fit = until_full(save)
        assert fit > 5
        assert list((disk.root / "vault/tmp").iterdir()) == []
        deletions = [("delete", f"s{number}", b"") for number in range(3)]
        run_steps(vault, [*deletions, ("collect", "", b"")], reporter)
        save(fit)
        history = History()
        history.feed(lines)
        disk.cut()
        found = find_in_vault(Vault(disk.root / "vault"))
        assert history.judge(found) == []
        assert len(found) == fit - 2


def test_file_that_does_not_fit_frees_its_space() -> None:
    """The size is unknown beforehand, so the error comes in the middle of a write."""

    def endless() -> Iterator[bytes]:
        while True:
            yield os.urandom(100_000)

    with CrashFS(scratch()) as disk:
        vault = Vault(disk.root / "vault")
        run_steps(vault, [("save", "x", b"x" * 1000)], Reporter(lambda _: None))
        before = free(disk.root)
        for _ in range(3):
            with pytest.raises(DiskFull, match="full while"):
                vault.put(endless())
            assert free(disk.root) >= before - (1 << 16)
        x = vault.manifest(*CheckpointId("training", "run:0", "x"))
        assert bytes(vault.read(x, "adapter")) == b"x" * 1000


def test_ledger_keeps_accepted_operations_on_a_full_disk() -> None:
    with CrashFS(scratch()) as disk:
        asyncio.run(accept_until_full_and_after(disk.root))
        disk.cut()
        asyncio.run(check_operations(disk.root, int((disk.root / "accepted").read_text())))


def test_ledger_without_space_to_open_is_not_reported_as_damaged() -> None:
    with CrashFS(scratch()) as disk:
        fill(disk.root / "filler")
        with pytest.raises(LedgerError, match=r"full|I/O") as failure:
            asyncio.run(Ledger.open(disk.root / LEDGER))
        assert not isinstance(failure.value, LedgerDamaged)
        (disk.root / "filler").unlink()
        asyncio.run(check_operations(disk.root, 0))


async def accept_until_full_and_after(root: Path) -> None:
    ledger = await Ledger.open(root / LEDGER)
    accepted = await accept(ledger, 0)
    filler = root / "filler"
    fill(filler)
    refused = 0
    for _ in range(MANY):  # the log may have allocated space left
        try:
            accepted = await accept(ledger, accepted)
        except NotWritten:
            refused += 1
            if refused == 3:
                break
    assert refused == 3
    again = await ledger.operation_by_seq_id("s", accepted - 1)
    assert again is not None, "an accepted operation can't be read"
    filler.unlink()
    for number in range(accepted, accepted + 3):
        assert await accept(ledger, number) == number + 1
    (root / "accepted").write_text(str(accepted + 3))
    handle = os.open(root / "accepted", os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    await ledger.close()


async def accept(ledger: Ledger, number: int) -> int:
    """Accept an operation and return the next number."""
    _, is_new = await ledger.accept(NewOperation("s", number, "step", bytes(20_000)))
    assert is_new
    return number + 1


async def check_operations(root: Path, accepted: int) -> None:
    ledger = await Ledger.open(root / LEDGER)
    there = await ledger.operations("s")
    await ledger.close()
    assert [each.seq_id for each in there] == list(range(accepted))
    assert [each.payload for each in there] == [bytes(20_000)] * accepted


def free(root: Path) -> int:
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize


def fill(path: Path) -> None:
    """Fill the file system with one file."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
        os.fsync(file.fileno())
