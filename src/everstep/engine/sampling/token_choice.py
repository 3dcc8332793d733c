"""Token choice: draws a sequence's next token from its row of logits alone.

A token is the first one at which the cumulated probabilities exceed a random number. In a large
vocabulary, to add them up one after another, or to sort them all, takes longer than the rest. So
the place is searched in sums of blocks, or among the likeliest tokens. Such sums differ from the
definition's by rounding: where that may decide, it is computed by the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.engine.sampling.spec import SampleSpec
from everstep.wire.codecs.proto import TopkOutput

Array = np.ndarray[Any, Any]
_CELLS = 1 << 15
"""Logits that are worked on at once: their float64 numbers stay in a core's cache."""
_BLOCK = 128
"""Probabilities that are added up at once, where a row has many."""
_MANY = 1 << 12
"""Probabilities of a row from which a part of them is searched."""
_MARGIN = 1e-9
"""Distance below which rounding may decide: sums of a million probabilities differ by 1e-10."""
_NEAR = 4.0
"""Distance from the largest scaled logit at which the likeliest tokens are searched first."""


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
    numbers = np.array([random.random() for random in streams])
    totals = weights.sum(-1, keepdims=True)
    if weights.shape[-1] >= _MANY:
        rows = [(weights[i if len(weights) > 1 else 0], number) for i, number in enumerate(numbers)]
        sums = np.broadcast_to(totals, (len(rows), 1))
        return [_search(*row, total) for row, total in zip(rows, sums[:, 0], strict=True)]
    return _search_all(weights / totals, numbers)


def _search_all(probabilities: Array, numbers: Array) -> list[int]:
    """Search each number in the cumulated probabilities of its row, or of the only one."""
    cumulated = np.cumsum(probabilities, -1)
    targets = numbers * cumulated[:, -1]
    if len(cumulated) == 1:
        found = np.searchsorted(cumulated[0], targets, side="right")
    else:
        found = np.count_nonzero(cumulated <= targets[:, None], axis=-1)
    tokens: list[int] = np.minimum(found, cumulated.shape[-1] - 1).tolist()
    return tokens


def _search(weights: Array, number: float, total: float) -> int:
    """Search a number in the cumulated probabilities of a row [V]: the sum of blocks first."""
    whole = len(weights) // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(-1)
    ends = np.cumsum(sums)
    block = int(np.searchsorted(ends, number * total))
    before = ends[block - 1] if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    place = _clear_place((before + np.cumsum(inside)) / total, number)
    if place is None or abs(before / total - number) < _MARGIN:  # or near the block before
        return _search_all((weights / total)[None], np.array([number]))[0]
    return block * _BLOCK + place


def _clear_place(cumulated: Array, number: float) -> int | None:
    """Return the place of a number among sums. None: it is so near to one that rounding decides.

    The end of the sums counts as near.
    """
    place = int(np.searchsorted(cumulated, number))
    around = cumulated[max(0, place - 1) : place + 1]
    if place == len(cumulated) or np.abs(around - number).min() < _MARGIN:
        return None
    return place


def _invert_restricted(scaled: Array, spec: SampleSpec, random: np.random.Generator) -> int:
    """Draw from the likeliest tokens of a row. Equal ones are in the order of their ids.

    Only values are sorted, which is much faster than to sort ids by them.
    """
    number = random.random()
    ordered, place = _search_nucleus(scaled, spec, number)
    if place is None:
        ordered, place = _search_likeliest(scaled, spec, number)
    value = ordered[place]
    before = int(np.count_nonzero(ordered[:place] > value))
    return int(np.flatnonzero(scaled == value)[place - before])


def _search_nucleus(scaled: Array, spec: SampleSpec, number: float) -> tuple[Array, int | None]:
    """Search a number among the tokens that `top_p` keeps, where `top_k` keeps all.

    Returns:
        The likeliest tokens' values in descending order, and the number's place. None: rounding
        decides, or there are no such tokens.
    """
    if 0 < spec.top_k < len(scaled) or len(scaled) < _MANY:
        return scaled, None
    total = np.exp(scaled).sum()
    share = (spec.top_p + _MARGIN) * total
    ordered = _near_largest(scaled, lambda values: bool(np.exp(values).sum() > share))
    cumulated = np.cumsum(np.exp(ordered) / total)
    last = _clear_place(cumulated, spec.top_p)
    if last is None:
        return ordered, None
    kept = cumulated[: last + 1]
    return ordered, _clear_place(kept, number * kept[-1])


def _search_likeliest(scaled: Array, spec: SampleSpec, number: float) -> tuple[Array, int]:
    """Search a number among the tokens that the request keeps, by the definition."""
    if 0 < spec.top_k < len(scaled):
        ordered = _near_largest(scaled, lambda values: len(values) >= spec.top_k)[: spec.top_k]
    else:
        ordered = np.sort(scaled)[::-1]
    weights = np.exp(np.ascontiguousarray(ordered))
    cumulated = np.cumsum(weights / weights.sum())
    if spec.top_p < 1:
        cumulated = cumulated[: int(np.searchsorted(cumulated, spec.top_p)) + 1]
    place = int(np.searchsorted(cumulated, number * cumulated[-1], side="right"))
    return ordered, min(place, len(cumulated) - 1)


def _near_largest(scaled: Array, enough: Callable[[Array], bool]) -> Array:
    """Return the largest values of a row, whose largest is 0, in descending order.

    Args:
        scaled: the row.
        enough: whether these values, in any order, are as many as are needed.
    """
    values, distance = scaled, _NEAR
    while len(scaled) >= _MANY and distance < 32 * _NEAR:
        near = scaled[scaled > -distance]
        if enough(near):
            values = near
            break
        distance *= 1.5
    return np.sort(values)[::-1]
