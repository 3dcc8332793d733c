"""Numbers: the results of runs, and the difference of two results to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.wire.messages.outputs import ForwardBackwardOutput, SampleResponse

Array = np.ndarray[Any, Any]
_LOSS = "loss:sum"


@dataclass(frozen=True)
class Point:
    """The numbers of one training pass or sample.

    Attributes:
        logprobs: float32, of all datums, or of prompt and sequences, concatenated.
        loss: of the pass, if it has one.
    """

    logprobs: Array
    loss: float | None = None


Trace = Sequence[Point]
"""The results of consecutive operations."""


@dataclass(frozen=True)
class Difference:
    """The difference between two traces.

    Attributes:
        count: number of values whose bits differ, losses included.
        total: number of values compared.
        largest: largest difference between two logprobs. Infinity if their shapes differ.
        largest_loss: largest difference between two losses.
        first: index of the first operation that differs, or None.
    """

    count: int
    total: int
    largest: float
    largest_loss: float
    first: int | None

    def within(self, tolerance: float) -> bool:
        """Return whether the traces are equal: bit for bit if the tolerance is 0."""
        if tolerance == 0:
            return self.count == 0
        return self.largest <= tolerance

    def __str__(self) -> str:
        if self.count == 0:
            return f"all {self.total} values are equal bit for bit"
        return (
            f"{self.count} of {self.total} values differ, from operation {(self.first or 0) + 1} "
            f"on; logprobs by up to {self.largest:.3g}, losses by up to {self.largest_loss:.3g}"
        )


def point_of_pass(output: ForwardBackwardOutput) -> Point:
    """Return the numbers of a training pass.

    Raises:
        KeyError: it has no logprobs.
    """
    rows = [row["logprobs"].values.astype(np.float32) for row in output.loss_fn_outputs]
    logprobs = np.concatenate(rows) if rows else np.empty(0, np.float32)
    return Point(logprobs, output.metrics.get(_LOSS))


def point_of_sample(output: SampleResponse) -> Point:
    """Return the numbers of a sample: prompt logprobs if present, else the sequences' logprobs."""
    if output.prompt_logprobs_np is not None:
        return Point(output.prompt_logprobs_np[1:].astype(np.float32))
    rows = [s.logprobs_np for s in output.sequences if s.logprobs_np is not None]
    return Point(np.concatenate(rows) if rows else np.empty(0, np.float32))


def difference(a: Trace, b: Trace) -> Difference:
    """Compare two traces."""
    if len(a) != len(b):
        return Difference(1, 1, np.inf, 0.0, min(len(a), len(b)))
    count, total, largest, largest_loss = 0, 0, 0.0, 0.0
    first = None
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        here, by = _differing_logprobs(one.logprobs, other.logprobs)
        total += max(len(one.logprobs), len(other.logprobs))
        largest = max(largest, by)
        if one.loss is not None or other.loss is not None:
            total += 1
            if not _same_bits(one.loss, other.loss):
                here += 1
                largest_loss = max(largest_loss, _distance(one.loss, other.loss))
        count += here
        first = index if first is None and here else first
    return Difference(count, total, largest, largest_loss, first)


def _differing_logprobs(a: Array, b: Array) -> tuple[int, float]:
    if a.shape != b.shape:
        return max(len(a), len(b), 1), np.inf
    differ = a.view(np.uint32) != b.view(np.uint32)
    if not differ.any():
        return 0, 0.0
    with np.errstate(invalid="ignore"):
        by = np.abs(a[differ].astype(np.float64) - b[differ].astype(np.float64))
    return int(differ.sum()), float(np.inf if np.isnan(by).any() else by.max())


def _same_bits(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.float64(a).view(np.uint64) == np.float64(b).view(np.uint64))


def _distance(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return float("inf")
    distance = abs(a - b)
    return float("inf") if distance != distance else distance  # noqa: PLR0124  NaN
