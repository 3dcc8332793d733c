"""The power is cut under a program that saves, overwrites, deletes, collects, accepts, succeeds.

Real file systems, the real kernel: what was not on the device is gone. The home goes through all
cuts of a test, one life after the other; after each it is opened and looked through.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import everstep.ledger
import everstep.vault  # noqa: F401  they register their failpoints
from everstep.failpoints import registered
from everstep.testing import faulty
from everstep.testing.crashfs import CrashFS, scratch
from everstep.testing.devices import why_not
from everstep.testing.history import History, Reporter, Violation
from everstep.testing.invariants import check_vault
from everstep.testing.lives import End, Lives
from everstep.testing.nursery import Nursery
from everstep.testing.workload import run_steps
from everstep.vault import Vault
from tests.faults.disk.limits import SOAK, rounds

FAILPOINTS = [name for name in registered() if name.split(".")[0] in ("vault", "ledger")]
KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(why_not(kind) is not None, reason=str(why_not(kind)))
    )
    for kind in ("ext4", "xfs")
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 3 * SOAK)]
STEPS = 25
CUTS = {"failpoint": 80, "acknowledged": 40, "call": 60, "random": 40}
"""On each kind of file system."""
RARE = ("vault.delete.removed", "vault.collect.marked")


def seed(chance: random.Random) -> int:
    return chance.randrange(1 << 30)


def good(end: End) -> None:
    assert end.violations == []
    assert end.failures == []


def test_there_are_cuts_enough() -> None:
    assert len(FAILPOINTS) >= 8
    assert sum(CUTS.values()) >= 200


@pytest.mark.parametrize("kind", KINDS)
def test_at_every_failpoint(kind: str, nursery: Nursery) -> None:
    """Wherever something is half done."""
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            reached = dict.fromkeys(FAILPOINTS, 0)
            for number in range(10):
                for name in FAILPOINTS:
                    nth = 1 + (number // 3 if name in RARE else 2 * number)
                    end = lives.until_failpoint(name, nth, seed=seed(chance), steps=STEPS)
                    good(end)
                    reached[name] += end.reached
            assert disk.cuts >= CUTS["failpoint"]
            assert min(reached.values()) >= 5, reached


@pytest.mark.parametrize("kind", KINDS)
def test_as_soon_as_something_is_acknowledged(kind: str, nursery: Nursery) -> None:
    """Nothing that comes later can have made it durable."""
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            for number in range(CUTS["acknowledged"]):
                end = lives.until_paused(
                    seed=seed(chance),
                    steps=STEPS,
                    pause_after=chance.randint(1, 12),
                    pause_on=("vault:", "operation:", "row:", "")[number % 4],
                )
                good(end)
                assert end.reached
                assert end.acknowledged
            assert disk.cuts == CUTS["acknowledged"]


@pytest.mark.parametrize("kind", KINDS)
def test_before_any_call_that_changes_the_vault(kind: str, nursery: Nursery) -> None:
    """The seed repeats them exactly."""
    pending = 0
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            for _ in range(CUTS["call"]):
                call = chance.randint(1, 120)
                end = lives.until_paused(seed=seed(chance), steps=STEPS, hang_at_call=call)
                good(end)
                pending += end.pending
            assert disk.cuts == CUTS["call"]
    assert pending >= 10, "hardly anything was under way"


@pytest.mark.parametrize("kind", KINDS)
def test_at_random_moments(kind: str, nursery: Nursery) -> None:
    """The seed repeats the work and the delays, the kernel decides the rest."""
    pending = 0
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            for _ in range(CUTS["random"]):
                end = lives.until(chance.uniform(0, 0.15), seed=seed(chance), steps=4 * STEPS)
                good(end)
                pending += end.pending
            assert disk.cuts == CUTS["random"]
    assert pending >= 10, "hardly anything was under way"


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_is_gone_also_when_it_is_left_without_power(kind: str) -> None:
    with pytest.raises(RuntimeError), CrashFS(scratch(), kind) as disk:
        disk.power_off()
        raise RuntimeError
    assert str(disk.root) not in Path("/proc/mounts").read_text()
    assert not disk.root.parent.exists()


# The tests above would notice


FORGOTTEN = {"files": "damaged", "directories": "acknowledged and lost"}


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("sort", FORGOTTEN)
def test_a_forgotten_fsync_is_noticed(sort: str, nursery: Nursery) -> None:
    caught: list[Violation] = []
    for number in range(5):
        with CrashFS(scratch()) as disk:
            end = Lives(nursery, disk).until_paused(
                seed=number, steps=STEPS, pause_after=3, pause_on="vault:", forget_fsync=sort
            )
            assert end.reached
            caught += end.violations[:1]
    assert len(caught) >= 4
    assert FORGOTTEN[sort] in {each.rule for each in caught}


@pytest.mark.parametrize("kind", KINDS)
def test_one_forgotten_fsync_is_noticed(kind: str) -> None:
    """Of any file, and of the last directory; the last makes good what other directories need."""

    def saved(forgotten: int) -> tuple[list[Path], list[str]]:
        lines: list[bytes] = []
        with CrashFS(scratch(), kind) as disk:
            vault = disk.root / "vault"
            with faulty.without_fsync(forgotten) as synced:
                run_steps(Vault(vault), [("save", "x", b"x" * 9000)], Reporter(lines.append))
            history = History()
            history.feed(lines)
            disk.cut()
            return synced, [each.rule for each in check_vault(vault, history)[0]]

    synced, wrong = saved(0)
    assert wrong == []
    files = [nth for nth, path in enumerate(synced, 1) if path.parent.name == "tmp"]
    assert [saved(nth)[1] for nth in files] == [["damaged"]] * 3
    assert saved(len(synced))[1] == ["acknowledged and lost"]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_an_unsynced_file_is_gone(tmp_path: Path) -> None:
    with CrashFS(scratch()) as disk:
        (disk.root / "a").write_bytes(b"a")
        disk.cut()
        assert not (disk.root / "a").exists()
