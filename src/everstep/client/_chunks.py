"""Cutting a forward_backward into requests, and putting their results together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from everstep.wire.inputs import Datum
from everstep.wire.outputs import ForwardBackwardOutput

_BYTES_PER_VALUE = {"float32": 4, "int64": 8}
_BYTES_PER_TOKEN = 4


def split(data: Sequence[Datum], most: int, most_bytes: int) -> list[list[Datum]]:
    """Cut datums into chunks of at most so many, and so many bytes; one datum is never cut."""
    chunks: list[list[Datum]] = []
    room = 0
    for datum in data:
        size = _size(datum)
        if not chunks or len(chunks[-1]) >= most or size > room:
            chunks.append([])
            room = most_bytes
        chunks[-1].append(datum)
        room -= size
    return chunks or [[]]


def combine(results: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """Put the chunks' results together; metrics by the reduction that their names end in.

    Raises:
        ValueError: a metric is not called ``name:reduction``.
    """
    outputs = [output for result in results for output in result.loss_fn_outputs]
    weights = [len(result.loss_fn_outputs) for result in results]
    metrics: dict[str, float] = {}
    for key in dict.fromkeys(key for result in results for key in result.metrics):
        _, colon, reduction = key.partition(":")
        if not colon or ":" in reduction:
            raise ValueError(f"metric {key!r} is not called name:reduction")
        if reduction in _REDUCTIONS:
            found = [
                (result.metrics[key], weight)
                for result, weight in zip(results, weights, strict=True)
                if key in result.metrics
            ]
            values = [value for value, _ in found]
            metrics[key] = _REDUCTIONS[reduction](values, [weight for _, weight in found])
            if reduction == "unique":  # values that can't be folded get keys of their own
                metrics |= {f"{key}_{index}": v for index, v in enumerate(values[1:], start=1)}
    return ForwardBackwardOutput(results[0].loss_fn_output_type, outputs, metrics)


def _size(datum: Datum) -> int:
    size = _BYTES_PER_TOKEN * sum(
        len(chunk.tokens) if chunk.type == "encoded_text" else 0
        for chunk in datum.model_input.chunks
    )
    for tensor in datum.loss_fn_inputs.values():
        size += _BYTES_PER_VALUE[tensor.dtype] * tensor.to_numpy().size
    return size


def _mean(values: list[float], weights: list[int]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else values[0]


_REDUCTIONS: dict[str, Callable[[list[float], list[int]], float]] = {
    "mean": _mean,
    "sum": lambda values, weights: sum(values),
    "min": lambda values, weights: min(values),
    "max": lambda values, weights: max(values),
    "slack": lambda values, weights: max(values) - _mean(values, weights),
    "unique": lambda values, weights: values[0],
    "hash2": lambda values, weights: float(sum(int(value) for value in values) % 2**64),
}
