"""What do saves and loads of a state of 1.45 GB cost, a tenth of that of a 100B-class MoE?

    python benchmarks/large_state.py [--quick] [--dir .] [--layers 10] [--rank 512]

The figures are those of `checkpoints.py`. The state does not fit into spare memory, so a step that
follows a save may wait for the disk. It needs 10 GB of memory and as much of disk.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from checkpoints import MODEL, TINY, Case, Limits, write_model
from figures import Figure, run
from serving import serving


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    """Yield the figures."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir) as name:
        directory, home = Path(name), Path(name) / "home"
        write_model(directory / "model", arguments.layers)
        models = (f"{MODEL}={directory / 'model'}", f"{TINY}={TINY}")
        with serving(home, "memory_bytes=16000000000", models=models) as served:
            case = Case(served, home, arguments.rank, 1 if arguments.quick else 3)
            yield from case.memory()
            limits = Limits(case.size, directory)
            yield from case.saves(limits)
            yield from case.loads(limits)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--dir", type=Path, default=Path(), help="a directory on the disk to test")
    parser.add_argument("--layers", type=int, default=10, help="layers of the model")
    parser.add_argument("--rank", type=int, default=512, help="rank of the adapter")


if __name__ == "__main__":
    run(__doc__, measure, add_options)
