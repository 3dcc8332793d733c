"""Cutting a forward_backward into requests, and putting their results together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from everstep.wire.inputs import Datum, DmelChunk, EncodedTextChunk, ImageChunk, ModelInputChunk
from everstep.wire.outputs import ForwardBackwardOutput
from everstep.wire.tensors import TensorData

_BYTES_PER_TOKEN = 4
_BYTES_PER_INDEX = 8


def split(data: Sequence[Datum], most: int, most_bytes: int) -> list[list[Datum]]:
    """Cut datums into chunks of at most so many, and so many bytes; one datum is never cut.

    Raises:
        ValueError: a datum holds what can't be trained on.
    """
    chunks: list[list[Datum]] = []
    room = 0
    for datum in data:
        size = datum_bytes(datum)
        if not chunks or len(chunks[-1]) >= most or size > room:
            chunks.append([])
            room = most_bytes
        chunks[-1].append(datum)
        room -= size
    return chunks or [[]]


def combine(results: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """Put the chunks' results together; metrics by the reduction that their names end in.

    A metric that not every chunk has is left out, and so is one of an unknown reduction.

    Raises:
        ValueError: a metric is not called ``name:reduction``.
    """
    outputs = [output for result in results for output in result.loss_fn_outputs]
    weights = [len(result.loss_fn_outputs) for result in results]
    metrics: dict[str, float] = {}
    for key in results[0].metrics:
        _, colon, reduction = key.partition(":")
        if not colon or ":" in reduction:
            raise ValueError(f"metric {key!r} is not called name:reduction")
        values = [result.metrics[key] for result in results if key in result.metrics]
        if reduction not in _REDUCTIONS or len(values) < len(results):
            continue
        metrics[key] = _REDUCTIONS[reduction](values, weights)
        if reduction == "unique":  # values that can't be folded get keys of their own
            metrics |= {f"{key}_{index}": v for index, v in enumerate(values[1:], start=1)}
    return ForwardBackwardOutput(results[0].loss_fn_output_type, outputs, metrics)


def datum_bytes(datum: Datum) -> int:
    """About as many bytes as the datum takes in a request."""
    chunks = sum(_chunk_bytes(chunk) for chunk in datum.model_input.chunks)
    return chunks + sum(_tensor_bytes(tensor) for tensor in datum.loss_fn_inputs.values())


def _chunk_bytes(chunk: ModelInputChunk) -> int:
    if isinstance(chunk, EncodedTextChunk):
        return _BYTES_PER_TOKEN * len(chunk.tokens)
    if isinstance(chunk, ImageChunk):
        return len(chunk.data)
    if isinstance(chunk, DmelChunk):
        return len(chunk.dmel)
    raise ValueError(f"a chunk of type {chunk.type} can't be trained on")


def _tensor_bytes(tensor: TensorData) -> int:
    indices = len(tensor.sparse_crow_indices or ()) + len(tensor.sparse_col_indices or ())
    return int(tensor.values.nbytes) + _BYTES_PER_INDEX * indices


def _mean(values: list[float], weights: list[int]) -> float:
    total = sum(weights)
    if not total:
        return sum(values) / len(values)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total


def _extreme(
    choose: Callable[[list[float]], float],
) -> Callable[[list[float], list[int]], float]:
    """A choice that NaN spoils, wherever it stands."""

    def reduce(values: list[float], weights: list[int]) -> float:
        undefined = [value for value in values if value != value]  # noqa: PLR0124  NaN
        return undefined[0] if undefined else choose(values)

    return reduce


_largest = _extreme(max)
_REDUCTIONS: dict[str, Callable[[list[float], list[int]], float]] = {
    "mean": _mean,
    "sum": lambda values, weights: sum(values),
    "min": _extreme(min),
    "max": _largest,
    "slack": lambda values, weights: _largest(values, weights) - _mean(values, weights),
    "unique": lambda values, weights: values[0],
    "hash2": lambda values, weights: sum(int(value) for value in values) % 2**64,
}
