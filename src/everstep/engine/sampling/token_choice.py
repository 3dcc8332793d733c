"""Token choice: draws a sequence's next token from its row of logits alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.engine.sampling.spec import SampleSpec
from everstep.wire.codecs.proto import TopkOutput

Array = np.ndarray[Any, Any]
_CELLS = 1 << 15
"""Logits that are worked on at once: their float64 numbers stay in a core's cache."""


def stream(seed: int, index: int) -> np.random.Generator:
    """Return the random stream of a request's i-th sequence.

    Seeds of 64 bits with a sign have distinct streams: a negative one is taken as the unsigned
    number of the same bits.
    """
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def log_softmax(logits: Array) -> Array:
    """Compute the logprobs of one row, float64 [V]."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: Array = shifted - np.log(np.exp(shifted).sum())
    return result


@dataclass(frozen=True)
class Draws:
    """What a request's sequences have drawn, in their order.

    Attributes:
        tokens: their tokens.
        logprobs: the tokens' logprobs.
        top: likeliest tokens and their logprobs, where they are requested.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[Array, Array]]


def draw(logits: Array, spec: SampleSpec, streams: Sequence[np.random.Generator]) -> Draws:
    """Draw a token from each stream. A row's draw depends on its own logits alone.

    Args:
        logits: float32 [R, V], a row for each stream, or [1, V] for all of them.
        spec: the request.
        streams: the sequences' random streams.
    """
    shared = len(logits) == 1
    rows = len(streams) if shared else max(1, _CELLS // logits.shape[-1])
    draws = Draws([], [], [])
    for begin in range(0, len(streams), rows):
        part = logits if shared else logits[begin : begin + rows]
        _draw_part(part, spec, streams[begin : begin + rows], draws)
    return draws


def choose(logits: Array, spec: SampleSpec, random: np.random.Generator) -> int:
    """Draw a token from a row of float32 logits [V].

    Temperature, top_k and top_p restrict the tokens. The draw inverts the cumulative probabilities
    of the remaining ones and uses one uniform number per token.
    """
    if spec.temperature == 0:
        return int(logits.argmax())
    return _invert(_shifted(logits[None]), spec, [random])[0]


def top_tokens(logprobs: Array, k: int) -> tuple[Array, Array]:
    """Return a row's k likeliest tokens and their logprobs, equal ones in the order of ids."""
    ids = np.arange(len(logprobs))
    if 0 < k < len(logprobs):
        ids = np.flatnonzero(logprobs >= np.partition(logprobs, -k)[-k])
    order = ids[np.argsort(-logprobs[ids], kind="stable")[:k]]
    return order.astype(np.int32), logprobs[order].astype(np.float32)


def stack_top_tokens(rows: list[tuple[Array, Array]], k: int) -> TopkOutput:
    """Stack rows of `top_tokens` into one result."""
    ids = np.array([row[0] for row in rows], dtype=np.int32).reshape(-1, k)
    return TopkOutput(ids, np.array([row[1] for row in rows], dtype=np.float32).reshape(-1, k))


def _draw_part(
    logits: Array, spec: SampleSpec, streams: Sequence[np.random.Generator], draws: Draws
) -> None:
    """Draw from rows whose float64 numbers fit into a cache."""
    shifted = _shifted(logits)
    weights = np.exp(shifted)
    logarithms = np.log(weights.sum(-1))
    if spec.temperature == 0:
        tokens = np.broadcast_to(logits.argmax(-1), len(streams)).tolist()
    else:
        tokens = _invert(shifted, spec, streams, weights if spec.temperature == 1 else None)
    for index, token in enumerate(tokens):
        row = index if len(logits) > 1 else 0
        draws.logprobs.append(float(shifted[row, token] - logarithms[row]))
        if spec.topk_sample_logprobs:
            logprobs = shifted[row] - logarithms[row]
            draws.top.append(top_tokens(logprobs, spec.topk_sample_logprobs))
    draws.tokens.extend(tokens)


def _shifted(logits: Array) -> Array:
    """Return float64 logits [R, V] less their rows' largest."""
    shifted: Array = np.subtract(logits, logits.max(-1, keepdims=True), dtype=np.float64)
    return shifted


def _invert(
    shifted: Array,
    spec: SampleSpec,
    streams: Sequence[np.random.Generator],
    weights: Array | None = None,
) -> list[int]:
    """Invert the rows' cumulative probabilities at the streams' next numbers.

    Args:
        shifted: result of `_shifted`, a row for each stream, or one for all.
        spec: the request.
        streams: the random streams.
        weights: exponentials of ``shifted``, if the temperature is 1 and they are known.
    """
    scaled = shifted
    if spec.temperature != 1:
        with np.errstate(over="ignore"):  # to -inf at tiny temperatures
            scaled = shifted / spec.temperature
    if 0 < spec.top_k < scaled.shape[-1] or spec.top_p < 1:
        return [
            _invert_restricted(scaled[index if len(scaled) > 1 else 0], spec, random)
            for index, random in enumerate(streams)
        ]
    if weights is None or scaled is not shifted:
        weights = np.exp(scaled)
    cumulated = np.cumsum(weights / weights.sum(-1, keepdims=True), -1)
    numbers = np.array([random.random() for random in streams])
    targets = numbers * cumulated[:, -1]
    if len(cumulated) == 1:
        found = np.searchsorted(cumulated[0], targets, side="right")
    else:
        found = np.count_nonzero(cumulated <= targets[:, None], axis=-1)
    tokens: list[int] = np.minimum(found, cumulated.shape[-1] - 1).tolist()
    return tokens


def _invert_restricted(scaled: Array, spec: SampleSpec, random: np.random.Generator) -> int:
    """Draw from the likeliest tokens of a row. Equal ones are in the order of their ids.

    Only values are sorted, which is much faster than to sort ids by them.
    """
    ordered = np.sort(scaled)[::-1]
    if 0 < spec.top_k < len(ordered):
        ordered = ordered[: spec.top_k]
    weights = np.exp(np.ascontiguousarray(ordered))
    cumulated = np.cumsum(weights / weights.sum())
    if spec.top_p < 1:
        cumulated = cumulated[: int(np.searchsorted(cumulated, spec.top_p)) + 1]
    place = int(np.searchsorted(cumulated, random.random() * cumulated[-1], side="right"))
    place = min(place, len(cumulated) - 1)
    value = ordered[place]
    before = int(np.count_nonzero(ordered[:place] > value))
    return int(np.flatnonzero(scaled == value)[place - before])
