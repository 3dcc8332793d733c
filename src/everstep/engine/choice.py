"""Choosing the next token of one sequence: from one row of logits, alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from everstep.engine.sample_spec import SampleSpec
from everstep.wire.proto import TopkOutput

Array = np.ndarray[Any, Any]


def stream(seed: int, index: int) -> np.random.Generator:
    """The random numbers of a request's i-th sequence."""
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def log_softmax(logits: Array) -> Array:
    """Logprobs of one row, float64 [V]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


def choose(logits: Array, spec: SampleSpec, random: np.random.Generator) -> int:
    """Draw a token from a row of float32 logits [V] as the request asks.

    The draw is by inversion of the cumulated probabilities of what temperature, top_k and top_p
    leave, one uniform number a token.
    """
    if spec.temperature == 0:
        return int(logits.argmax())
    shifted = logits.astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # to -inf, when the temperature is next to nothing
        scaled = shifted / spec.temperature
    order = np.argsort(-scaled, kind="stable") if _restricted(spec, len(scaled)) else None
    if order is not None:
        if 0 < spec.top_k < len(scaled):
            order = order[: spec.top_k]
        scaled = scaled[order]
    weights = np.exp(scaled)
    cumulated = np.cumsum(weights / weights.sum())
    if order is not None and spec.top_p < 1:
        kept = int(np.searchsorted(cumulated, spec.top_p)) + 1
        cumulated = cumulated[:kept]
    index = int(np.searchsorted(cumulated, random.random() * cumulated[-1], side="right"))
    index = min(index, len(cumulated) - 1)
    return int(order[index]) if order is not None else index


def likeliest(logprobs: Array, k: int) -> tuple[Array, Array]:
    """The k likeliest tokens of a row and their logprobs; the lower id first among equals."""
    order = np.argsort(-logprobs, kind="stable")[:k]
    return order.astype(np.int32), logprobs[order].astype(np.float32)


def stacked(rows: list[tuple[Array, Array]], k: int) -> TopkOutput:
    """Rows of `likeliest` as one result."""
    ids = np.array([row[0] for row in rows], dtype=np.int32).reshape(-1, k)
    return TopkOutput(ids, np.array([row[1] for row in rows], dtype=np.float32).reshape(-1, k))


def _restricted(spec: SampleSpec, vocabulary: int) -> bool:
    return 0 < spec.top_k < vocabulary or spec.top_p < 1
