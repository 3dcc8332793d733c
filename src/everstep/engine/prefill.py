"""A prompt on its way through the model, block by block, from where it is known."""

from __future__ import annotations

import torch

from everstep.engine.attention import Group, decoding
from everstep.engine.model import Model
from everstep.engine.prefixes import BLOCK, Prefixes
from everstep.engine.prompt_scores import first_scored, prompt_scores
from everstep.engine.sequences import Sampled


class Prefill:
    """Computes one request's prompt, by itself.

    Args:
        model: computes it.
        request: whose cache is filled; empty so far.
        prefixes: what was computed before.
    """

    def __init__(self, model: Model, request: Sampled, prefixes: Prefixes) -> None:
        self.request = request
        self._model = model
        self._prefixes = prefixes
        self._tokens = request.spec.tokens
        self._first = min(first_scored(request.spec), len(self._tokens)) - 1  # state that is needed
        self._states: list[torch.Tensor] = []
        self._hits = 0
        if request.space is not None:
            known = self._tokens[: self._first]
            self._hits = prefixes.restore(request.space, known, request.cache)
        self._computed = self._hits

    def step(self) -> bool:
        """Compute a block; returns whether that was the last."""
        end = min(self._computed + BLOCK, len(self._tokens))
        tokens = torch.from_numpy(self._tokens[self._computed : end]).to(self._model.device)
        positions = torch.arange(self._computed, end, device=tokens.device)
        with decoding([Group(slice(0, 1), self.request.cache)]):
            hidden = self._model.hidden(tokens.unsqueeze(0), position_ids=positions.unsqueeze(0))[0]
        needed = max(0, self._first - self._computed)
        if needed < len(hidden):
            self._states.append(hidden[needed:])
        self._computed = end
        return end == len(self._tokens)

    def finish(self) -> torch.Tensor:
        """Score the prompt as it is asked for, and keep its blocks.

        Returns:
            Float32 logits of the token that follows it, [1, V].
        """
        request = self.request
        states = torch.cat(self._states)
        request.prompt = prompt_scores(self._model, states, request.spec, self._first)
        request.prompt["prompt_cache_hit_tokens"] = self._hits
        if request.space is not None:
            self._prefixes.keep(request.space, self._tokens, request.cache)
        return self._model.logits(states[-1:])
