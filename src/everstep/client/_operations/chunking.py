"""Chunking: split a training pass into requests and combine their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from everstep.wire import types

_BYTES_PER_TOKEN = 4
_BYTES_PER_INDEX = 8


def split(data: Sequence[types.Datum], max_datums: int, max_bytes: int) -> list[list[types.Datum]]:
    """Split datums into chunks of bounded count and size. A datum is never split.

    Args:
        data: the datums.
        max_datums: the largest number of datums in a chunk.
        max_bytes: the largest size of a chunk, unless a single datum is larger.

    Raises:
        ValueError: a datum contains a chunk that can't be trained on.
    """
    chunks: list[list[types.Datum]] = []
    free = 0
    for datum in data:
        size = datum_bytes(datum)
        if not chunks or len(chunks[-1]) >= max_datums or size > free:
            chunks.append([])
            free = max_bytes
        chunks[-1].append(datum)
        free -= size
    return chunks or [[]]


def combine(results: Sequence[types.ForwardBackwardOutput]) -> types.ForwardBackwardOutput:
    """Combine the chunks' results. A metric's name ends in the reduction to use.

    A metric is omitted if a chunk lacks it, or if its reduction is unknown.

    Raises:
        ValueError: a metric is not named ``name:reduction``.
    """
    outputs = [output for result in results for output in result.loss_fn_outputs]
    weights = [len(result.loss_fn_outputs) for result in results]
    metrics: dict[str, float] = {}
    for key in results[0].metrics:
        _, colon, reduction = key.partition(":")
        if not colon or ":" in reduction:
            raise ValueError(f"metric {key!r} is not named name:reduction")
        values = [result.metrics[key] for result in results if key in result.metrics]
        if reduction not in _REDUCTIONS or len(values) < len(results):
            continue
        metrics[key] = _REDUCTIONS[reduction](values, weights)
        if reduction == "unique":  # the values of other chunks get keys of their own
            metrics |= {f"{key}_{index}": v for index, v in enumerate(values[1:], start=1)}
    return types.ForwardBackwardOutput(results[0].loss_fn_output_type, outputs, metrics)


def datum_bytes(datum: types.Datum) -> int:
    """Estimate the size of a datum in a request."""
    chunks = sum(_chunk_bytes(chunk) for chunk in datum.model_input.chunks)
    return chunks + sum(_tensor_bytes(tensor) for tensor in datum.loss_fn_inputs.values())


def _chunk_bytes(chunk: types.ModelInputChunk) -> int:
    if isinstance(chunk, types.EncodedTextChunk):
        return _BYTES_PER_TOKEN * len(chunk.tokens)
    if isinstance(chunk, types.ImageChunk):
        return len(chunk.data)
    if isinstance(chunk, types.DmelChunk):
        return len(chunk.dmel)
    raise ValueError(f"training on a chunk of type {chunk.type} is not supported")


def _tensor_bytes(tensor: types.TensorData) -> int:
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
    """Return a reduction that gives NaN if any of its values is NaN."""

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
