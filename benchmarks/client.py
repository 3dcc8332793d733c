"""What does a client cost that has only been imported, and the examples that it builds?

    python benchmarks/client.py [--quick]

Imports are measured in processes of their own, by the CPU time that they use beyond an empty
program's. Datums are built from lists of Python's numbers. The peer is the official client, and
both take turns in one run. ``steps.py`` measures a step.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import tinker
from figures import Figure, run

import everstep

DATUMS, TOKENS = 32, 2048
PEER = "official client"
Row = tuple[list[int], list[int], list[float]]


def rows() -> list[Row]:
    """Return tokens, targets and weights of each datum."""
    numbers = random.Random(1)

    def tokens() -> list[int]:
        return [numbers.randrange(2, 150_000) for _ in range(TOKENS)]

    return [(tokens(), tokens(), [numbers.random() for _ in range(TOKENS)]) for _ in range(DATUMS)]


def build(sdk: Any, data: list[Row]) -> list[Any]:
    """Build a datum of each row."""
    return [
        sdk.Datum(
            model_input=sdk.ModelInput.from_ints(tokens),
            loss_fn_inputs={"target_tokens": targets, "weights": weights},
        )
        for tokens, targets, weights in data
    ]


def import_seconds(code: str) -> float:
    """Return the CPU time of a program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a function."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def best(count: int, *measured: Callable[[], float]) -> list[float]:
    """Return the least of several measurements of each, which take turns: noise only adds."""
    rounds = [[measure() for measure in measured] for _ in range(count)]
    return [min(each) for each in zip(*rounds, strict=True)]


def imports(count: int) -> Iterator[Figure]:
    """Yield the figures of imports."""
    empty, ours, types, theirs = best(
        count,
        lambda: import_seconds("pass"),
        lambda: import_seconds("import everstep; everstep.ServiceClient"),
        lambda: import_seconds("from everstep import types; types.Datum"),
        lambda: import_seconds("import tinker; tinker.ServiceClient"),
    )
    peer = (theirs - empty) * 1e3
    yield Figure("import everstep, ServiceClient", (ours - empty) * 1e3, "ms", PEER, peer, 0.2)
    yield Figure("from everstep import types, Datum", (types - empty) * 1e3, "ms", PEER, peer, 0.2)


def datums(count: int) -> Iterator[Figure]:
    """Yield the figures of datums."""
    data = rows()
    ours, theirs = best(
        count,
        lambda: cpu_seconds(lambda: build(everstep, data)),
        lambda: cpu_seconds(lambda: build(tinker, data)),
    )
    what = f"{DATUMS} datums of {TOKENS:,} tokens from lists"
    yield Figure(what, DATUMS / ours, "datums/s", PEER, DATUMS / theirs, 1.5)


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    yield from imports(3 if arguments.quick else 9)
    yield from datums(10 if arguments.quick else 40)


if __name__ == "__main__":
    run(__doc__, measure)
