"""Hypothesis strategies: programs for a vault, and crashes of a recording."""

from __future__ import annotations

from hypothesis import strategies as st

from everstep.testing.memoryfs import Crash, Log
from everstep.testing.workload import Step

_CONTENTS = (b"", b"a", b"shared", b"\0" * 5000, bytes(range(256)) * 20)


def steps(longest: int = 12) -> st.SearchStrategy[list[Step]]:
    """Programs for `workload.run_steps`: saves, forks, deletions, collections.

    Args:
        longest: maximum number of steps.
    """
    what = st.sampled_from(("save", "save", "save", "fork", "delete", "collect"))
    each = st.tuples(what, st.sampled_from(("x", "y", "z")), st.sampled_from(_CONTENTS))
    return st.lists(each, min_size=1, max_size=longest)


@st.composite
def crashes(draw: st.DrawFn, log: Log) -> Crash:
    """A possible state after a power cut at some moment of a recording."""
    position = draw(st.integers(0, len(log.entries)))
    chance = draw(st.randoms(use_true_random=False))
    return log.crash(position, chance, ordered=draw(st.booleans()))
