"""Sampling batch: decodes requests of any length and adapter together.

A request's numbers do not depend on the others in its pass:

- Projections are matrix products whose rows have the same bits for every row count that is a
  multiple of 16, or of 4 where that was measured. Each adapter's rows are padded to such a count.
- Attention is computed for each request alone (see `attention`).
- A token is chosen from one row of logits, on an accelerator where they are (`device_choice`).
- In a mixture of experts, a product has as many rows as were routed to the expert. There a pass
  holds one request.

A prompt is computed once for all its samples, alone and in blocks of a fixed length, so that
blocks of other requests can be reused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from everstep.engine.errors import EngineError
from everstep.engine.models.attention import CachedRows
from everstep.engine.models.model import Model
from everstep.engine.run_state import Adapter
from everstep.engine.sampling import device_choice
from everstep.engine.sampling.prefill import Prefill
from everstep.engine.sampling.prefix_cache import PrefixCache
from everstep.engine.sampling.sequence import Logits, SampleRequest
from everstep.engine.sampling.spec import SampleSpec
from everstep.engine.transfer import to_host
from everstep.wire.codecs.proto import SampleOutput
from everstep.wire.messages.streams import DrawnTokens

MIN_ROWS = 4
"""Rows to which a pass is padded at least. Products of 4 rows read weights 1.3 times as fast as
those of 2: at 28 GB/s, where 2 rows reach 22 and a sum over the weights 34."""
MAX_ROWS = 256
"""Rows of active sequences at which no further prompt is started."""
Array = np.ndarray[Any, Any]
Finished = tuple[str, SampleOutput | Exception]


class SamplingBatch:
    """The requests that one model samples at the same time.

    Args:
        model: the base model.
        prefix_cache: cache of prompts' blocks. None: no blocks are kept.
    """

    def __init__(self, model: Model, prefix_cache: PrefixCache | None = None) -> None:
        self._model = model
        self._prefix_cache = prefix_cache or PrefixCache(0)
        self._prefill: Prefill | None = None
        self._waiting: deque[SampleRequest] = deque()
        self._active: dict[str, SampleRequest] = {}
        self._prefilled_last = False

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._active or self._prefill)

    def add(
        self, key: str, spec: SampleSpec, adapter: Adapter | None, namespace: str | None = None
    ) -> None:
        """Queue a request.

        Args:
            key: identifies the request in the results of `step`.
            spec: the request. `validation.check_sample` has accepted it.
            adapter: adapter to sample with. None: the base model.
            namespace: namespace of the prefix cache. Requests of one namespace have the same
                adapter and reuse one another's blocks. None: blocks are neither read nor kept.
        """
        info = self._model.info
        available = info.max_context_length - len(spec.tokens)
        limit = available if spec.max_tokens is None else min(spec.max_tokens, available)
        self._waiting.append(
            SampleRequest(
                key, spec, adapter, limit, info.eos_token_ids, self._model.tokenizer, namespace
            )
        )

    def cancel(self, key: str) -> None:
        """Remove a request. An unknown key is ignored."""
        self._active.pop(key, None)
        if self._prefill is not None and self._prefill.request.key == key:
            self._prefill = None
        self._waiting = deque(request for request in self._waiting if request.key != key)

    def holds(self, key: str) -> bool:
        """Whether a request is unfinished."""
        queued = [*self._waiting, *([self._prefill.request] if self._prefill else [])]
        return key in self._active or any(request.key == key for request in queued)

    def drawn(self, key: str, position: int) -> list[DrawnTokens]:
        """Return the tokens that an unfinished request has drawn from a position on."""
        request = self._active.get(key)
        return request.drawn(position) if request is not None else []

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """Compute a block of one prompt, or one token of every active sequence, in turns.

        Returns:
            The requests that have finished or failed.
        """
        has_rows = sum(len(r.alive) for r in self._active.values()) < MAX_ROWS
        can_prefill = self._prefill is not None or (bool(self._waiting) and has_rows)
        if can_prefill and not (self._active and self._prefilled_last):
            self._prefilled_last = True
            return self._prefill_block()
        self._prefilled_last = False
        return self._decode()

    def _prefill_block(self) -> list[Finished]:
        """Compute the next block of the current prompt, or the first block of the next prompt."""
        request = self._prefill.request if self._prefill else self._waiting.popleft()
        try:
            with self._bound(request.adapter):
                if self._prefill is None:
                    self._prefill = Prefill(self._model, request, self._prefix_cache)
                if not self._prefill.step():
                    return []
                (logits,) = _fetch(self._prefill.finish(), [(request, slice(0, 1))])
            self._prefill = None
            request.check(logits)  # also where no token is drawn
            if request.alive:
                alive = request.draw(logits)
                request.cache.branch(len(alive))
        except (EngineError, RuntimeError, ValueError) as error:
            self._prefill = None
            return [(request.key, error)]
        if not request.alive:
            return [(request.key, request.output())]
        self._active[request.key] = request
        return []

    def _decode(self) -> list[Finished]:
        requests = sorted(self._active.values(), key=lambda r: id(r.adapter))
        passes = [[request] for request in requests] if self._model.mixes_rows else [requests]
        return [result for part in passes for result in self._decode_together(part)]

    def _decode_together(self, requests: Sequence[SampleRequest]) -> list[Finished]:
        decoder = self._model.decoder
        tokens, positions, cached, adapters = _layout(requests, decoder.row_multiple)
        try:
            logits = decoder.logits(tokens, positions, cached, adapters)
            places = [rows.rows for rows in cached]
            fetched = _fetch(logits, list(zip(requests, places, strict=True)))
        except (EngineError, RuntimeError) as error:
            for request in requests:  # their caches are partly written, so none can continue
                del self._active[request.key]
            return [(request.key, error) for request in requests]
        finished: list[Finished] = []
        for request, own in zip(requests, fetched, strict=True):
            result = self._advance(request, own)
            if result is not None:
                del self._active[request.key]
                finished.append((request.key, result))
        return finished

    def _advance(self, request: SampleRequest, logits: Logits) -> SampleOutput | Exception | None:
        """Draw a request's next tokens. Returns its result when it has ended."""
        before = len(request.alive)
        try:
            alive = request.draw(logits)
        except (EngineError, RuntimeError, ValueError) as error:
            return error
        if not alive:
            return request.output()
        if len(alive) < before:
            request.cache.select_rows(alive)
        return None

    def _bound(self, adapter: Adapter | None) -> AbstractContextManager[None]:
        """Bind an adapter to all rows of a prompt."""
        return self._model.binding.bind(*([] if adapter is None else [adapter.bind()]))


def _fetch(
    logits: torch.Tensor, requests: Sequence[tuple[SampleRequest, slice]]
) -> Sequence[Logits]:
    """Fetch requests' rows of logits to the host, or from a device what it draws from them."""
    if device_choice.chooses_on(logits.device):
        return device_choice.draw(logits, [request.rows(rows) for request, rows in requests])
    on_host = to_host(logits)
    return [on_host[rows] for _, rows in requests]


def _layout(
    requests: Sequence[SampleRequest], row_multiple: Callable[[Adapter | None], int]
) -> tuple[Array, Array, list[CachedRows], list[tuple[Adapter | None, slice]]]:
    """Lay out a pass: a row per alive sequence, each adapter's rows padded to its multiple."""
    tokens: list[int] = []
    positions: list[int] = []
    cached: list[CachedRows] = []
    adapters: list[tuple[Adapter | None, slice]] = []
    begin = 0
    for index, request in enumerate(requests):
        first = len(tokens)
        tokens += [sequence.tokens[-1] for sequence in request.alive]
        positions += [request.position] * len(request.alive)
        cached.append(CachedRows(slice(first, len(tokens)), request.cache))
        last = index + 1 == len(requests) or requests[index + 1].adapter is not request.adapter
        if last:
            padding = -(len(tokens) - begin) % row_multiple(request.adapter)
            if index + 1 == len(requests):
                padding = max(padding, MIN_ROWS - len(tokens))
            tokens += [0] * padding
            positions += [0] * padding
            adapters.append((request.adapter, slice(begin, len(tokens))))
            begin = len(tokens)
    return (
        np.array(tokens, dtype=np.int64),
        np.array(positions, dtype=np.int64),
        cached,
        adapters,
    )
