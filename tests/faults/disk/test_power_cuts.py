"""Power cuts under a program that uses vault and ledger.

The file systems and the kernel are real: data that was not on the device is lost. One home goes
through all cuts of a test, and is opened and checked after each.

A commit makes a fifth of the cuts, which its hash chooses. `make soak` makes all of them.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

import everstep.ledger
import everstep.vault  # noqa: F401  registers their failpoints
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
from tests.faults.disk import compaction_program
from tests.faults.disk.limits import SOAK, rounds
from tests.faults.rotation import share_of_commit

COMPACTION = [name for name in registered() if name.startswith("ledger.compaction.")]
"""Failpoints that only a program reaches which fills and prunes whole segments."""
FAILPOINTS = [
    name
    for name in registered()
    if name.split(".")[0] in ("vault", "ledger") and name not in COMPACTION
]
KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(why_not(kind) is not None, reason=str(why_not(kind)))
    )
    for kind in ("ext4", "xfs")
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 3 * SOAK)]
STEPS = 25
CUTS = {"failpoint": 80, "acknowledged": 40, "call": 60, "random": 40}
"""The number of cuts on each kind of file system. A commit makes one of the shares."""
SHARES = 5
RARE = ("vault.delete.removed", "vault.collect.marked")


def seed(chance: random.Random) -> int:
    return chance.randrange(1 << 30)


def cuts_of_commit(which: str) -> int:
    """Return the number of cuts that this run makes on a disk."""
    return CUTS[which] // (1 if SOAK else SHARES)


def check_end(end: End) -> None:
    assert end.violations == []
    assert end.failures == []


def test_number_of_cuts_is_sufficient() -> None:
    assert len(FAILPOINTS) >= 8
    assert sum(CUTS.values()) >= 200
    assert [count % SHARES for count in CUTS.values()] == [0] * len(CUTS)


@pytest.mark.long(reason="a power cut for each failpoint")
@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_every_failpoint_loses_nothing(kind: str, nursery: Nursery) -> None:
    """Cut the power in the middle of each operation."""
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            reached = dict.fromkeys(FAILPOINTS, 0)
            # Each share has early and late calls: few programs reach the late ones.
            pairs = [
                [
                    (name, 1 + (number // 3 if name in RARE else 2 * number), seed(chance))
                    for number in (early, 9 - early)
                    for name in FAILPOINTS
                ]
                for early in range(5)
            ]
            chosen = share_of_commit(pairs, SHARES, "pairs of calls")
            for name, nth, base in itertools.chain.from_iterable(chosen):
                end = lives.until_failpoint(name, nth, seed=base, steps=STEPS)
                check_end(end)
                reached[name] += end.reached
            assert disk.cuts == 2 * len(FAILPOINTS) * len(chosen)
            assert disk.cuts >= CUTS["failpoint"] // (1 if SOAK else SHARES)
            assert min(reached.values()) >= len(chosen), reached


@pytest.mark.parametrize("kind", KINDS)
def test_cut_while_segments_are_compacted_loses_nothing(kind: str, nursery: Nursery) -> None:
    assert len(COMPACTION) == 2
    with CrashFS(scratch(), kind) as disk:
        lives = Lives(nursery, disk, target=f"{compaction_program.__name__}:live")
        for nth, name in itertools.product((1, 2), COMPACTION):
            end = lives.until_failpoint(name, nth)
            check_end(end)
            assert end.reached


@pytest.mark.parametrize("kind", KINDS)
def test_cut_right_after_an_acknowledgement_loses_nothing(kind: str, nursery: Nursery) -> None:
    """Cut before any later fsync could make the acknowledged work durable."""
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            cases = [
                {
                    "seed": seed(chance),
                    "pause_after": chance.randint(1, 12),
                    "pause_on": ("vault:", "operation:", "row:", "")[number % 4],
                }
                for number in range(CUTS["acknowledged"])
            ]
            for case in share_of_commit(cases, SHARES, "cuts"):
                end = lives.until_paused(steps=STEPS, **case)
                check_end(end)
                assert end.reached
                assert end.acknowledged
            assert disk.cuts == cuts_of_commit("acknowledged")


@pytest.mark.long(reason="a power cut before each of many calls")
@pytest.mark.parametrize("kind", KINDS)
def test_cut_before_any_call_loses_nothing(kind: str, nursery: Nursery) -> None:
    """Cut before a call that the seed chooses and repeats exactly."""
    pending = 0
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            cases = [(chance.randint(1, 120), seed(chance)) for _ in range(CUTS["call"])]
            for call, base in share_of_commit(cases, SHARES, "cuts"):
                end = lives.until_paused(seed=base, steps=STEPS, hang_at_call=call)
                check_end(end)
                pending += end.pending
            assert disk.cuts == cuts_of_commit("call")
    assert pending >= cuts_of_commit("call") // 6, "too few changes were in progress"


@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_random_moments_loses_nothing(kind: str, nursery: Nursery) -> None:
    """Cut after a delay. The seed repeats work and delays, but not the kernel's timing."""
    pending = 0
    for chance in rounds():
        with CrashFS(scratch(), kind) as disk:
            lives = Lives(nursery, disk)
            cases = [(chance.uniform(0, 0.15), seed(chance)) for _ in range(CUTS["random"])]
            for seconds, base in share_of_commit(cases, SHARES, "cuts"):
                end = lives.until(seconds, seed=base, steps=4 * STEPS)
                check_end(end)
                pending += end.pending
            assert disk.cuts == cuts_of_commit("random")
    assert pending >= cuts_of_commit("random") // 4, "too few changes were in progress"


@pytest.mark.parametrize("kind", KINDS)
def test_disk_without_power_is_unmounted_and_removed(kind: str) -> None:
    with pytest.raises(RuntimeError), CrashFS(scratch(), kind) as disk:
        disk.power_off()
        raise RuntimeError
    assert str(disk.root) not in Path("/proc/mounts").read_text()
    assert not disk.root.parent.exists()


# Checks of the tests above


FORGOTTEN = {"files": "damaged", "directories": "acknowledged and lost"}


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("sort", FORGOTTEN)
def test_forgotten_fsync_is_detected(sort: str, nursery: Nursery) -> None:
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
def test_single_forgotten_fsync_is_detected(kind: str) -> None:
    """Forget the fsync of each file, and of the last directory, which replaces earlier ones."""

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
def test_unsynced_file_is_lost(tmp_path: Path) -> None:
    with CrashFS(scratch()) as disk:
        (disk.root / "a").write_bytes(b"a")
        disk.cut()
        assert not (disk.root / "a").exists()
