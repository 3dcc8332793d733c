"""Device choice: draws tokens on the accelerator that computed their logits.

Logits stay on the device. Random numbers and settings go up, a few bytes a row, and tokens with
their logprobs come down in one copy for all requests of a pass.

A row's bits depend on its own logits and settings alone. Torch's sums on CUDA don't have this
property, as they split a row by how many rows there are, and its cumulated sums of floats have no
deterministic form. So sums are a tree of additions of neighbours, elementwise and in a fixed order,
and a number is searched from the tree's root to a leaf. Zeros behind a row don't change the tree.
The order of the likeliest tokens is one of integers, each of which holds a logit and its token.

Tokens are those of `token_choice`, but where two sums that differ by rounding decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from everstep.engine.sampling.spec import SampleSpec
from everstep.engine.sampling.token_choice import Draws
from everstep.engine.transfer import is_accelerator, to_host, upload

Array = np.ndarray[Any, Any]
_CELLS = 1 << 23
"""Logits that are worked on at once: 64 MiB for each array of float64."""
_LOW = (1 << 32) - 1
_SETTINGS = 3
"""Settings of a row before its random numbers: temperature, top_k and top_p."""


class _Kind(IntEnum):
    """How a row's tokens are chosen."""

    LIKELIEST = 0
    ALL = 1
    TOP_K = 2
    TOP_P = 3


@dataclass(frozen=True)
class Rows:
    """A request's rows of the logits of a pass.

    Attributes:
        rows: their place: a row for each stream, or one for all of them.
        spec: the request.
        streams: the sequences' random streams.
    """

    rows: slice
    spec: SampleSpec
    streams: Sequence[np.random.Generator]


@dataclass(frozen=True)
class Chosen:
    """What was drawn for a request on a device.

    Attributes:
        largest: the largest logit of each row, [R, 1]. Not finite where the logits are not.
        draws: the tokens and their logprobs.
    """

    largest: Array
    draws: Draws


@dataclass(frozen=True)
class _Row:
    """One row of logits to choose from.

    Attributes:
        request: index of the request.
        place: row of the logits.
        kind: how its tokens are chosen.
        spec: the request.
        numbers: a random number for each token to draw.
    """

    request: int
    place: int
    kind: _Kind
    spec: SampleSpec
    numbers: list[float]

    @property
    def group(self) -> tuple[_Kind, int, int]:
        """Rows of equal groups are computed together, and have results of equal length."""
        return self.kind, self.spec.topk_sample_logprobs, len(self.numbers)


def chooses_on(device: torch.device) -> bool:
    """Whether tokens are chosen on a device. Apple's computes no float64."""
    return is_accelerator(device) and device.type != "mps"


def draw(logits: torch.Tensor, requests: Sequence[Rows]) -> list[Chosen]:
    """Draw a token from each stream of each request, and copy them to the host at once.

    Args:
        logits: float32 [R, V], on any device.
        requests: the requests. Rows that are none's are ignored.
    """
    vocabulary = logits.shape[-1]
    rows = [row for index, each in enumerate(requests) for row in _rows(index, each, vocabulary)]
    rows.sort(key=lambda row: row.group)
    order = upload(np.array([row.place for row in rows], dtype=np.int64), logits.device)
    flat = [number for row in rows for number in (*_settings(row, vocabulary), *row.numbers)]
    settings = upload(np.array(flat, dtype=np.float64), logits.device)
    found, begin, used = [], 0, 0
    for part in _parts(rows, vocabulary):
        end = begin + len(part)
        width = _SETTINGS + len(part[0].numbers)
        own = settings[used : used + len(part) * width].view(len(part), width)
        found.append(_choose(logits.index_select(0, order[begin:end]), own, part).view(-1))
        begin, used = end, used + len(part) * width
    return _unpack(to_host(torch.cat(found)), rows, requests)


def _rows(index: int, request: Rows, vocabulary: int) -> Iterator[_Row]:
    """Yield a request's rows, with a random number for each token that depends on one."""
    spec = request.spec
    kind = _Kind.ALL
    if spec.temperature == 0:
        kind = _Kind.LIKELIEST
    elif 0 < spec.top_k < vocabulary:
        kind = _Kind.TOP_K
    elif spec.top_p < 1:
        kind = _Kind.TOP_P
    draws = kind is not _Kind.LIKELIEST
    numbers = [float(stream.random()) if draws else 0.0 for stream in request.streams]
    places = range(request.rows.start, request.rows.stop)
    for row, place in enumerate(places):
        own = numbers if len(places) == 1 else [numbers[row]]
        yield _Row(index, place, kind, spec, own)


def _settings(row: _Row, vocabulary: int) -> tuple[float, float, float]:
    kept = row.spec.top_k if row.kind is _Kind.TOP_K else vocabulary
    return row.spec.temperature or 1.0, float(kept), row.spec.top_p


def _parts(rows: Sequence[_Row], vocabulary: int) -> Iterator[list[_Row]]:
    """Yield rows of one group, as many as are worked on at once."""
    size = max(1, _CELLS // vocabulary)
    for _, group in groupby(rows, key=lambda row: row.group):
        equal = list(group)
        for begin in range(0, len(equal), size):
            yield equal[begin : begin + size]


def _choose(logits: torch.Tensor, settings: torch.Tensor, rows: Sequence[_Row]) -> torch.Tensor:
    """Choose tokens from rows of one group.

    Args:
        logits: float32 [R, V].
        settings: float64 [R, 3 + S]: temperature, top_k, top_p and S random numbers.
        rows: what the host knows of them.

    Returns:
        Float64 [R, 1 + 2 S + 2 K]: the largest logit, S tokens and their logprobs, and the K
        likeliest tokens and theirs.
    """
    kind, likeliest, _ = rows[0].group
    temperature, numbers = settings[:, :1], settings[:, _SETTINGS:]
    largest = logits.amax(-1, keepdim=True).double()  # NaN if one of a row is
    shifted = logits.double() - largest
    sums = _sums(shifted.exp())
    logarithms = sums[-1].log()
    kept = {_Kind.TOP_K: max(row.spec.top_k for row in rows), _Kind.TOP_P: logits.shape[-1]}
    count = max(kept.get(kind, 0), likeliest)
    ids = _likeliest(logits, count) if count else logits.new_empty(len(rows), 0, dtype=torch.int64)
    if kind is _Kind.LIKELIEST:
        tokens = logits.argmax(-1, keepdim=True).expand(-1, numbers.shape[1])
    elif kind is _Kind.ALL:
        if any(row.spec.temperature != 1 for row in rows):
            sums = _sums((shifted / temperature).exp())
        tokens, _ = _search(sums, numbers * sums[-1])
    else:
        scaled = shifted.gather(1, ids) / temperature
        tokens = ids.gather(1, _restricted(scaled.exp(), settings))
    top = ids[:, :likeliest]
    logprobs = (shifted.gather(1, each) - logarithms for each in (tokens, top))
    return torch.cat([largest, tokens.double(), next(logprobs), top.double(), next(logprobs)], 1)


def _restricted(weights: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    """Search numbers among the likeliest tokens that top_k and top_p keep.

    Args:
        weights: float64 [R, N], the likeliest tokens' in their order.
        settings: as in `_choose`.

    Returns:
        Places among the N tokens, int64 [R, S].
    """
    top_k, top_p = settings[:, 1:2], settings[:, 2:3]
    outside = torch.arange(weights.shape[1], device=weights.device) >= top_k
    sums = _sums(weights.masked_fill(outside, 0))
    last, before = _search(sums, top_p * sums[-1], reached=True)
    nucleus = before + sums[0].gather(1, last)
    total = torch.where(top_p < 1, nucleus, sums[-1])
    last = torch.where(top_p < 1, last, weights.shape[1] - 1)
    places, _ = _search(sums, settings[:, _SETTINGS:] * total)
    return torch.minimum(places, last)


def _likeliest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Return the tokens of the largest logits in descending order, equal ones by their ids.

    A key holds a logit's bits, in an integer of the same order, above its token. No two keys are
    equal, so there is one order of them, however a device sorts.

    Args:
        logits: float32 [R, V].
        count: number of tokens.

    Returns:
        int64 [R, count].
    """
    bits = (logits + 0.0).view(torch.int32)  # 0 for -0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.long() << 32) | (_LOW - ids)
    if count < logits.shape[1]:
        found = keys.topk(count).values
    else:
        found = keys.sort(descending=True).values
    return _LOW - (found & _LOW)


def _sums(weights: torch.Tensor) -> list[torch.Tensor]:
    """Add neighbours up, their sums, and so on: [R, N], [R, N / 2] to [R, 1], padded by zeros."""
    levels = [weights]
    while (width := levels[-1].shape[1]) > 1:
        if width % 2:
            levels[-1] = pad(levels[-1], (0, 1))
        levels.append(levels[-1][:, 0::2] + levels[-1][:, 1::2])
    return levels


def _search(
    sums: Sequence[torch.Tensor], targets: torch.Tensor, *, reached: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search the first place at which cumulated weights exceed a target. Its weight is not 0.

    Args:
        sums: result of `_sums`. The total is above 0.
        targets: float64 [R, S], 0 or more.
        reached: search the first place at which they equal a target, which is above 0, or exceed
            it.

    Returns:
        The places, int64 [R, S], and the sums of the weights before them, float64 [R, S].
    """
    places = torch.zeros_like(targets, dtype=torch.int64)
    before = torch.zeros_like(targets)
    for level in reversed(sums[:-1]):
        ends = before + level[:, 0::2].gather(1, places)
        # Rounding may put a target behind the last weight. What follows it is 0.
        more = level[:, 1::2].gather(1, places) > 0
        beyond = more & (ends < targets if reached else ends <= targets)
        before = torch.where(beyond, ends, before)
        places = 2 * places + beyond
    return places, before


def _unpack(flat: Array, rows: Sequence[_Row], requests: Sequence[Rows]) -> list[Chosen]:
    """Sort the results of rows, one after the other, by their requests' order."""
    results: dict[tuple[int, int], Array] = {}
    begin = 0
    for row in rows:
        end = begin + 1 + 2 * (len(row.numbers) + row.spec.topk_sample_logprobs)
        results[row.request, row.place] = flat[begin:end]
        begin = end
    found: list[Chosen] = []
    for index, request in enumerate(requests):
        places = range(request.rows.start, request.rows.stop)
        largest, draws = [], Draws([], [], [])
        k = request.spec.topk_sample_logprobs
        count = len(request.streams) if len(places) == 1 else 1
        for place in places:
            own = results[index, place]
            largest.append(own[:1])
            tokens, logprobs, ids, top = np.split(own[1:], np.cumsum([count, count, k]))
            draws.tokens.extend(tokens.astype(np.int64).tolist())
            draws.logprobs.extend(logprobs.tolist())
            if k:
                draws.top.extend([(ids.astype(np.int32), top.astype(np.float32))] * count)
        found.append(Chosen(np.stack(largest), draws))
    return found
