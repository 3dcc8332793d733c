"""Every write of ext4 is recorded while a program runs, and the disk is put into the states that a
power cut may leave: what was flushed, and any part of what was not.
"""

from __future__ import annotations

import os
import random

import pytest

from everstep.testing import invariants
from everstep.testing.blocktrace import RecordedFS, Replay, Trace, why_not
from everstep.testing.crashfs import scratch
from everstep.testing.history import History, Violation
from everstep.testing.lives import WORKLOAD
from everstep.testing.nursery import Nursery
from tests.faults.disk.limits import SOAK, rounds

KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(why_not(kind) is not None, reason=str(why_not(kind)))
    )
    for kind in ("ext4", "xfs")
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 3 * SOAK)]
STATES = {"ext4": 1000, "xfs": 300}


def record(nursery: Nursery, kind: str, steps: int, seed: int, forget: str | None = None) -> Trace:
    """What a disk was told while a program lived on it, and what that said."""
    with RecordedFS(scratch(), kind) as disk:
        marks = os.open(disk.marks, os.O_WRONLY)
        arguments = {"home": str(disk.root / "home"), "seed": seed, "steps": steps}
        child = nursery.start(WORKLOAD, {**arguments, "forget_fsync": forget}, events=marks)
        while not child.ended:
            child.lines()
        child.close()
        os.close(marks)
        trace = disk.trace()
    told = History()
    told.feed(trace.marks(len(trace.entries)))
    assert told.done
    assert not told.failures
    return trace


def first_mark(trace: Trace) -> int:
    """Before it there is no home."""
    return next(n for n in range(len(trace.entries)) if trace.marks(n))


def replayed(trace: Trace, chance: random.Random, count: int) -> tuple[list[Violation], int]:
    """Violations of so many states, and how many states there were."""
    replay = Replay(trace, scratch())
    states = trace.states(chance, count, start=first_mark(trace))
    found: list[Violation] = []
    for number, state in enumerate(states):
        history = History()
        history.feed(trace.marks(state.position))
        try:
            with replay.mounted(state) as root:
                wrong, _ = invariants.check(root / "home", history, thorough=number % 20 == 0)
        except OSError as error:
            wrong = [Violation("the disk can't be mounted", str(state.position), str(error))]
        found += wrong
    return found, len(states)


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_keeps_what_was_acknowledged(kind: str, nursery: Nursery) -> None:
    for chance in rounds():
        trace = record(nursery, kind, 25, chance.randrange(1 << 30))
        assert trace.flushes > 100
        wrong, states = replayed(trace, chance, STATES[kind])
        assert wrong == []
        assert states == STATES[kind]


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("sort", ["files", "directories"])
def test_a_forgotten_fsync_is_noticed(sort: str, nursery: Nursery) -> None:
    trace = record(nursery, "ext4", 20, 1, forget=sort)
    wrong, _ = replayed(trace, random.Random(1), 40)
    assert wrong


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_disk_that_forgets_flushes_is_noticed(nursery: Nursery) -> None:
    """If any flushed write may be lost, something that was acknowledged is."""
    trace = record(nursery, "ext4", 20, 1)
    end = len(trace.entries)
    start = first_mark(trace)
    unflushed = [each for each in trace.entries[start:] if each.kind != b"F"]
    liar = Trace(trace.kind, trace.size, trace.pristine, [*trace.entries[:start], *unflushed])
    assert len(liar.entries) < end
    wrong, _ = replayed(liar, random.Random(2), 40)
    assert wrong
