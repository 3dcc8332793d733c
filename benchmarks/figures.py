"""Figures of a benchmark, each beside a peer or a physical limit that was measured in the same run.

A benchmark is a script that yields `Figure`s. `run` gives it a command line and prints its table;
``make bench`` (`run_all.py`) runs all of them and prints one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from devices import described


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        what: what was measured, on which input.
        value: the figure.
        unit: its unit. A rate ends in ``/s``.
        peer: what it is compared with.
        peer_value: the peer's figure in the same unit, from the same run.
        aim: the ratio that is wanted: of a rate at least, of a duration or size at most. None if
            the figure is only shown.
    """

    what: str
    value: float
    unit: str
    peer: str
    peer_value: float
    aim: float | None = None

    @property
    def ratio(self) -> float:
        """The figure divided by its peer's."""
        return self.value / self.peer_value

    @property
    def more_is_better(self) -> bool:
        """Whether the figure is a rate."""
        return self.unit.endswith("/s")

    @property
    def reached(self) -> bool | None:
        """Whether the aim is reached. None if there is none."""
        if self.aim is None:
            return None
        return self.ratio >= self.aim if self.more_is_better else self.ratio <= self.aim


def run(
    description: str,
    measure: Callable[[argparse.Namespace], Iterable[Figure]],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Parse the command line of a benchmark, measure, and print the table.

    Args:
        description: the script's docstring.
        measure: yields the figures. Its argument has ``quick`` and the benchmark's own options.
        add_options: adds the benchmark's own options.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="measure less, with more noise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add_options(parser)
    arguments = parser.parse_args()
    figures = list(measure(arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(each) for each in figures], indent=2))
    gpu = described(arguments.device) if "device" in arguments else None
    print(table(figures, gpu))


def table(figures: Sequence[Figure], gpu: str | None = None) -> str:
    """Format figures as a table, with the load of the machine above it, and its GPU."""
    lines = [f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"]
    lines += [] if gpu is None else [gpu]
    width = max((len(each.what) for each in figures), default=0)
    for each in figures:
        shown = f"{_short(each.value)} {each.unit}"
        peer = f"{each.peer} {_short(each.peer_value)}"
        lines.append(f"{each.what:<{width}}  {shown:>16}  {each.ratio:6.2f}×{_aim(each)}  {peer}")
    return "\n".join(lines)


def median_seconds(action: Callable[[], object], clock: Callable[[], float], times: int) -> float:
    """Return the median duration of an action that is repeated."""
    found = []
    for _ in range(times):
        begin = clock()
        action()
        found.append(clock() - begin)
    return statistics.median(found)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _aim(figure: Figure) -> str:
    if figure.aim is None:
        return " " * 12
    sign = "≥" if figure.more_is_better else "≤"
    return f" {'✓' if figure.reached else '✗'} {sign} {figure.aim:<7g}"
