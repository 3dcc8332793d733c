"""Sampling: many requests, lengths and adapters in one decoding pass.

A request's numbers don't depend on what it shares a pass with. The projections are matrix
products whose rows have the same bits for every row count that is a multiple of 16, so each
adapter's rows are padded to one; attention is a request's own (see `attention`); the choice of a
token looks at one row. A prompt is computed once for all its samples, by itself and in blocks of
a fixed length, so that what is known of it from another request can be used. A mixture of
experts has products of as many rows as an expert was sent: there a pass holds one request.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from everstep.engine.attention import Group, decoding
from everstep.engine.errors import EngineError
from everstep.engine.lora import Bound
from everstep.engine.model import Model
from everstep.engine.prefill import Prefill
from everstep.engine.prefixes import Prefixes
from everstep.engine.sample_spec import SampleSpec
from everstep.engine.sequences import Sampled
from everstep.engine.state import Adapter
from everstep.wire.proto import SampleOutput
from everstep.wire.streams import DrawnTokens

_ROWS = 16
_MOST_ROWS = 256
Array = np.ndarray[Any, Any]
Finished = tuple[str, SampleOutput | Exception]


class SamplingBatch:
    """The requests that one model samples for at the same time.

    Args:
        model: the base model.
        prefixes: prompts that were computed before; None: none are kept.
    """

    def __init__(self, model: Model, prefixes: Prefixes | None = None) -> None:
        self._model = model
        self._prefixes = prefixes or Prefixes(0)
        self._prefill: Prefill | None = None
        self._waiting: deque[Sampled] = deque()
        self._active: OrderedDict[str, Sampled] = OrderedDict()
        self._prefilled_last = False

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._waiting or self._active or self._prefill)

    def add(
        self, key: str, spec: SampleSpec, adapter: Adapter | None, space: str | None = None
    ) -> None:
        """Take a request.

        Args:
            key: names it in what `step` returns.
            spec: what is asked; `sample_validation.check_sample` has accepted it.
            adapter: what it samples with; None: the base model.
            space: requests with the same one, which have the same adapter, reuse what was computed
                of one another's prompts; None: nobody's.
        """
        info = self._model.info
        room = info.max_context_length - len(spec.tokens)
        limit = room if spec.max_tokens is None else min(spec.max_tokens, room)
        self._waiting.append(
            Sampled(key, spec, adapter, limit, info.eos_token_ids, self._model.tokenizer, space)
        )

    def cancel(self, key: str) -> None:
        """Forget a request; an unknown one is no error."""
        self._active.pop(key, None)
        if self._prefill is not None and self._prefill.request.key == key:
            self._prefill = None
        self._waiting = deque(request for request in self._waiting if request.key != key)

    def holds(self, key: str) -> bool:
        """Whether a request is unfinished."""
        coming = [*self._waiting, *([self._prefill.request] if self._prefill else [])]
        return key in self._active or any(request.key == key for request in coming)

    def drawn(self, key: str, position: int) -> list[DrawnTokens]:
        """What an unfinished request has drawn from a position on."""
        request = self._active.get(key)
        return request.drawn(position) if request is not None else []

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """Compute a block of one prompt, or a token of everything that is active, by turns.

        Returns:
            The requests that are finished, or failed.
        """
        room = sum(len(r.alive) for r in self._active.values()) < _MOST_ROWS
        coming = self._prefill is not None or (bool(self._waiting) and room)
        if coming and not (self._active and self._prefilled_last):
            self._prefilled_last = True
            return self._advance_prompt()
        self._prefilled_last = False
        return self._decode()

    def _advance_prompt(self) -> list[Finished]:
        """Compute the next block of the prompt that is under way, or of the next one."""
        request = self._prefill.request if self._prefill else self._waiting.popleft()
        try:
            with self._bound([(request.adapter, slice(None))]):
                if self._prefill is None:
                    self._prefill = Prefill(self._model, request, self._prefixes)
                if not self._prefill.step():
                    return []
                logits = self._prefill.finish()
            self._prefill = None
            if request.alive:
                going = request.draw(logits.cpu().numpy())
                request.cache.select(torch.zeros(len(going), dtype=torch.long))
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
        return [ended for part in passes for ended in self._decode_together(part)]

    def _decode_together(self, requests: Sequence[Sampled]) -> list[Finished]:
        tokens, positions, groups, adapters = _layout(requests)
        device = self._model.device
        try:
            with self._bound(adapters), decoding(groups):
                hidden = self._model.hidden(
                    torch.from_numpy(tokens).to(device).unsqueeze(1),
                    position_ids=torch.from_numpy(positions).to(device).unsqueeze(1),
                )
                logits = self._model.logits(hidden[:, 0]).cpu().numpy()
        except (EngineError, RuntimeError) as error:
            for request in requests:  # their caches are part-written: none of them can go on
                del self._active[request.key]
            return [(request.key, error) for request in requests]
        finished: list[Finished] = []
        for request, group in zip(requests, groups, strict=True):
            ended = self._advance(request, logits[group.rows])
            if ended is not None:
                del self._active[request.key]
                finished.append((request.key, ended))
        return finished

    def _advance(self, request: Sampled, logits: Array) -> SampleOutput | Exception | None:
        """Draw a request's next tokens; its end, when it has come."""
        before = len(request.alive)
        try:
            going = request.draw(logits)
        except (EngineError, RuntimeError, ValueError) as error:
            return error
        if not going:
            return request.output()
        if len(going) < before:
            request.cache.select(torch.tensor(going))
        return None

    def _bound(
        self, adapters: Sequence[tuple[Adapter | None, slice]]
    ) -> AbstractContextManager[None]:
        bounds: list[Bound] = [
            adapter.bound(None if rows == slice(None) else rows)
            for adapter, rows in adapters
            if adapter is not None
        ]
        return self._model.binding.to(*bounds)


def _layout(
    requests: Sequence[Sampled],
) -> tuple[Array, Array, list[Group], list[tuple[Adapter | None, slice]]]:
    """Rows of a pass: one an alive sequence, each adapter's rows padded to a multiple of 16."""
    tokens: list[int] = []
    positions: list[int] = []
    groups: list[Group] = []
    adapters: list[tuple[Adapter | None, slice]] = []
    begin = 0
    for index, request in enumerate(requests):
        first = len(tokens)
        tokens += [sequence.tokens[-1] for sequence in request.alive]
        positions += [request.position] * len(request.alive)
        groups.append(Group(slice(first, len(tokens)), request.cache))
        last = index + 1 == len(requests) or requests[index + 1].adapter is not request.adapter
        if last:
            padding = -(len(tokens) - begin) % _ROWS
            tokens += [0] * padding
            positions += [0] * padding
            adapters.append((request.adapter, slice(begin, len(tokens))))
            begin = len(tokens)
    return (
        np.array(tokens, dtype=np.int64),
        np.array(positions, dtype=np.int64),
        groups,
        adapters,
    )
