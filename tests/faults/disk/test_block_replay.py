"""Block replay: every state that a power cut may leave keeps all acknowledged work.

The writes of a real file system are recorded while a program runs. A state has all flushed writes
and any part of the others. A commit checks a fifth of the drawn states, which its hash chooses;
`make soak` checks all of them.
"""

from __future__ import annotations

import os
import random

import pytest

from everstep.testing import invariants
from everstep.testing.blocktrace import RecordedFS, Replay, State, Trace, why_not
from everstep.testing.crashfs import scratch
from everstep.testing.history import History, Violation
from everstep.testing.lives import WORKLOAD
from everstep.testing.nursery import Nursery
from tests.faults.disk.limits import SOAK, rounds
from tests.faults.rotation import share_of_commit

KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(why_not(kind) is not None, reason=str(why_not(kind)))
    )
    for kind in ("ext4", "xfs")
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 3 * SOAK)]
STATES = {"ext4": 1000, "xfs": 300}
"""The number of drawn states. A commit checks one of the shares."""
SHARES = 5


def record(nursery: Nursery, kind: str, steps: int, seed: int, forget: str | None = None) -> Trace:
    """Return the writes of a disk and the reports of a program that ran on it."""
    with RecordedFS(scratch(), kind) as disk:
        marks = os.open(disk.marks, os.O_WRONLY)
        arguments = {"home": str(disk.root / "home"), "seed": seed, "steps": steps}
        child = nursery.start(WORKLOAD, {**arguments, "forget_fsync": forget}, events=marks)
        while not child.ended:
            child.lines()
        child.close()
        os.close(marks)
        trace = disk.trace()
    history = History()
    history.feed(trace.marks(len(trace.entries)))
    assert history.done
    assert not history.failures
    return trace


def first_mark(trace: Trace) -> int:
    """Return the position of the first report. There is no home before it."""
    return next(n for n in range(len(trace.entries)) if trace.marks(n))


def drawn(trace: Trace, chance: random.Random, count: int) -> list[State]:
    """Draw states after the first report."""
    return trace.states(chance, count, start=first_mark(trace))


def replayed(trace: Trace, states: list[State]) -> list[Violation]:
    """Check states. Return their violations."""
    replay = Replay(trace, scratch())
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
    return found


@pytest.mark.long(reason="hundreds of disk states are mounted and checked")
@pytest.mark.parametrize("kind", KINDS)
def test_every_state_keeps_acknowledged_work(kind: str, nursery: Nursery) -> None:
    for chance in rounds():
        trace = record(nursery, kind, 25, chance.randrange(1 << 30))
        assert trace.flushes > 100
        states = drawn(trace, chance, STATES[kind])
        assert len(states) == STATES[kind]
        assert replayed(trace, share_of_commit(states, SHARES, "states")) == []


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("sort", ["files", "directories"])
def test_forgotten_fsync_is_detected(sort: str, nursery: Nursery) -> None:
    trace = record(nursery, "ext4", 20, 1, forget=sort)
    assert replayed(trace, drawn(trace, random.Random(1), 40))


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_disk_that_forgets_flushes_is_detected(nursery: Nursery) -> None:
    """Without the flushes of the log, states lose acknowledged work."""
    trace = record(nursery, "ext4", 20, 1)
    end = len(trace.entries)
    start = first_mark(trace)
    unflushed = [each for each in trace.entries[start:] if each.kind != b"F"]
    without_flushes = Trace(
        trace.kind, trace.size, trace.pristine, [*trace.entries[:start], *unflushed]
    )
    assert len(without_flushes.entries) < end
    assert replayed(without_flushes, drawn(without_flushes, random.Random(2), 40))
