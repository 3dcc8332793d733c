"""A disk that is full, of bytes or of inodes: clear errors, no leftovers, and on with it."""

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
    """How many fit."""
    for number in range(MANY):
        try:
            save(number)
        except DiskFull as error:
            assert "room" in str(error) or "full" in str(error)
            return number
    raise AssertionError("it never was full")


@pytest.mark.parametrize(
    ("mkfs", "size"), [((), 300_000), (("-N", "64"), 10)], ids=["bytes", "inodes"]
)
def test_saves_until_it_is_full_and_after(mkfs: tuple[str, ...], size: int) -> None:
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


def test_a_file_that_does_not_fit_gives_its_space_back() -> None:
    """Its size is not known before, so the system's word comes in the middle of a write."""

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


def test_the_ledger_on_a_full_disk() -> None:
    with CrashFS(scratch()) as disk:
        asyncio.run(accept_until_full_and_after(disk.root))
        disk.cut()
        asyncio.run(all_is_there(disk.root, int((disk.root / "told").read_text())))


def test_a_ledger_that_has_no_room_to_open_is_not_called_damaged() -> None:
    with CrashFS(scratch()) as disk:
        fill(disk.root / "filler")
        with pytest.raises(LedgerError, match=r"full|I/O") as told:
            asyncio.run(Ledger.open(disk.root / LEDGER))
        assert not isinstance(told.value, LedgerDamaged)
        (disk.root / "filler").unlink()
        asyncio.run(all_is_there(disk.root, 0))


async def accept_until_full_and_after(root: Path) -> None:
    ledger = await Ledger.open(root / LEDGER)
    told = await accept(ledger, 0)
    filler = root / "filler"
    fill(filler)
    refused = 0
    for _ in range(MANY):  # what has its place in the log already may still fit
        try:
            told = await accept(ledger, told)
        except NotWritten:
            refused += 1
            if refused == 3:
                break
    assert refused == 3
    again = await ledger.operation_at("s", told - 1)
    assert again is not None, "what is there can be read"
    filler.unlink()
    for number in range(told, told + 3):
        assert await accept(ledger, number) == number + 1
    (root / "told").write_text(str(told + 3))
    handle = os.open(root / "told", os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    await ledger.close()


async def accept(ledger: Ledger, number: int) -> int:
    """Accept it; the number of the next one."""
    _, is_new = await ledger.accept(NewOperation("s", number, "step", bytes(20_000)))
    assert is_new
    return number + 1


async def all_is_there(root: Path, told: int) -> None:
    ledger = await Ledger.open(root / LEDGER)
    there = await ledger.operations("s")
    await ledger.close()
    assert [each.seq_id for each in there] == list(range(told))
    assert all(each.payload == bytes(20_000) for each in there)


def free(root: Path) -> int:
    found = os.statvfs(root)
    return found.f_bavail * found.f_frsize


def fill(path: Path) -> None:
    """Take all space that there is."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
        os.fsync(file.fileno())
