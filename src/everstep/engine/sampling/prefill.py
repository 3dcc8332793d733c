"""Prefill: computes a prompt block by block, after the blocks that are cached."""

from __future__ import annotations

import torch

from everstep.engine.models.attention import CachedRows, decoding
from everstep.engine.models.model import Model
from everstep.engine.sampling.prefix_cache import BLOCK, PrefixCache
from everstep.engine.sampling.prompt_logprobs import first_scored_position, score_prompt
from everstep.engine.sampling.sequence import SampleRequest
from everstep.engine.transfer import upload


class Prefill:
    """Computes one request's prompt, without any other request.

    Args:
        model: the base model.
        request: the request. Its cache is empty.
        prefix_cache: blocks of earlier prompts.
    """

    def __init__(self, model: Model, request: SampleRequest, prefix_cache: PrefixCache) -> None:
        self.request = request
        self._model = model
        self._prefix_cache = prefix_cache
        self._tokens = request.spec.tokens
        # The first position whose hidden state is needed.
        self._first = min(first_scored_position(request.spec), len(self._tokens)) - 1
        self._states: list[torch.Tensor] = []
        self._hits = 0
        if request.namespace is not None:
            reusable = self._tokens[: self._first]
            self._hits = prefix_cache.restore(request.namespace, reusable, request.cache)
        self._computed = self._hits

    def step(self) -> bool:
        """Compute a block. Returns whether it was the last one."""
        end = min(self._computed + BLOCK, len(self._tokens))
        tokens = upload(self._tokens[self._computed : end], self._model.device)
        positions = torch.arange(self._computed, end, device=tokens.device)
        with decoding([CachedRows(slice(0, 1), self.request.cache)]):
            hidden = self._model.hidden(tokens.unsqueeze(0), position_ids=positions.unsqueeze(0))[0]
        needed = max(0, self._first - self._computed)
        if needed < len(hidden):
            self._states.append(hidden[needed:])
        self._computed = end
        return end == len(self._tokens)

    def finish(self) -> torch.Tensor:
        """Score the prompt as requested and store its blocks in the cache.

        Returns:
            Float32 logits of the token after the prompt, [1, V].
        """
        request = self.request
        states = torch.cat(self._states)
        request.prompt = score_prompt(
            self._model, states, request.spec, self._first, request.adapter
        )
        request.prompt["prompt_cache_hit_tokens"] = self._hits
        if request.namespace is not None:
            self._prefix_cache.store(request.namespace, self._tokens, request.cache)
        with decoding(()):  # one row of the head's weights as they are read for every token
            return self._model.logits(states[-1:])
