"""Sample request: its sequences, their drawn tokens, and when each of them ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everstep.engine.models.kv_cache import KvCache
from everstep.engine.run_state import Adapter
from everstep.engine.sampling import device_choice, token_choice
from everstep.engine.sampling.finite import check_logits
from everstep.engine.sampling.spec import SampleSpec
from everstep.wire.codecs.proto import SampleOutput, SequenceOutput, TopkOutput
from everstep.wire.messages.outputs import Stop
from everstep.wire.messages.streams import DrawnTokens, Grown, drawn_since

Array = np.ndarray[Any, Any]
Logits = Array | device_choice.Chosen
"""Logits of a request's rows on the host, or what was drawn from them on a device."""
_CONTEXT_TOKENS = 8
"""Tokens decoded before a stop string, so that characters split over tokens are complete."""


@dataclass
class SampledSequence:
    """One sequence under way."""

    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[Array, Array]] = field(default_factory=list)
    stop: Stop | None = None


class SampleRequest:
    """A sample request under way.

    Args:
        key: the caller's identifier.
        spec: the request.
        adapter: adapter to sample with. None: the base model.
        limit: maximum new tokens of a sequence.
        eos: the model's end tokens.
        tokenizer: decodes tokens to find stop strings.
        namespace: namespace of the prefix cache. None: the cache is not used.
    """

    def __init__(
        self,
        key: str,
        spec: SampleSpec,
        adapter: Adapter | None,
        limit: int,
        eos: tuple[int, ...],
        tokenizer: Any,
        namespace: str | None = None,
    ) -> None:
        self.key = key
        self.spec = spec
        self.adapter = adapter
        self.namespace = namespace
        self.cache = KvCache()
        self.prompt: dict[str, Any] = {}
        self._limit = limit
        self._end_tokens = frozenset(spec.stop_tokens) | (
            frozenset(eos) if spec.use_eos else frozenset()
        )
        self._tokenizer = tokenizer
        self._sequences = [
            SampledSequence(token_choice.stream(spec.seed, i)) for i in range(spec.num_samples)
        ]
        self.alive = list(self._sequences) if limit else []
        for sequence in self._sequences:
            sequence.stop = None if limit else Stop.LENGTH

    @property
    def position(self) -> int:
        """Position of the alive sequences' last token."""
        return len(self.spec.tokens) + len(self.alive[0].tokens) - 1

    def rows(self, place: slice) -> device_choice.Rows:
        """Describe the request's rows of logits on a device, for a token of each alive sequence."""
        return device_choice.Rows(place, self.spec, [each.random for each in self.alive])

    def check(self, logits: Logits) -> None:
        """Raise `InputError` unless the logits are finite."""
        largest = logits if isinstance(logits, np.ndarray) else logits.largest
        check_logits(largest, self.adapter)

    def draw(self, logits: Logits) -> list[int]:
        """Draw a token for each alive sequence.

        Args:
            logits: float32 [alive, V], or [1, V] for all of them, or what a device drew from them.

        Returns:
            Rows of the sequences that stay alive.
        """
        self.check(logits)
        if isinstance(logits, np.ndarray):
            draws = token_choice.draw(logits, self.spec, [each.random for each in self.alive])
        else:
            draws = logits.draws
        kept = []
        for row, sequence in enumerate(self.alive):
            sequence.tokens.append(draws.tokens[row])
            sequence.logprobs.append(draws.logprobs[row])
            if draws.top:
                sequence.topk.append(draws.top[row])
            sequence.stop = self._stop(sequence.tokens)
            if sequence.stop is None:
                kept.append(row)
        if len(kept) < len(self.alive):
            self.alive = [self.alive[row] for row in kept]
        return kept

    def drawn(self, position: int) -> list[DrawnTokens]:
        """Return the tokens drawn from a position on."""
        grown = [_grown_since(position, sequence) for sequence in self._sequences]
        return drawn_since(position, grown, first=position)

    def output(self) -> SampleOutput:
        """Return the finished request's output."""
        k = self.spec.topk_sample_logprobs
        return SampleOutput(
            sequences=[
                SequenceOutput(
                    tokens=np.array(s.tokens, dtype=np.int32),
                    logprobs=np.array(s.logprobs, dtype=np.float32),
                    stop_reason=s.stop or Stop.LENGTH,
                    topk=self._topk(s, k) if k else None,
                )
                for s in self._sequences
            ],
            **self.prompt,
        )

    def _stop(self, tokens: list[int]) -> Stop | None:
        """Return why a sequence ends with its last token, or None."""
        if tokens[-1] in self._end_tokens or self._completes_stop_string(tokens):
            return Stop.STOP
        return Stop.LENGTH if len(tokens) >= self._limit else None

    def _completes_stop_string(self, tokens: list[int]) -> bool:
        """Whether the last token completes a stop string."""
        if not self.spec.stop_strings:
            return False
        reach = max(len(text.encode()) for text in self.spec.stop_strings) + _CONTEXT_TOKENS
        tail: str = self._tokenizer.decode(tokens[-reach:], clean_up_tokenization_spaces=False)
        return any(text in tail for text in self.spec.stop_strings)

    def _topk(self, sequence: SampledSequence, k: int) -> TopkOutput:
        return token_choice.stack_top_tokens(sequence.topk, k)


def _grown_since(position: int, sequence: SampledSequence) -> Grown:
    """Return a sequence's end for streaming, in float32 as in the output."""
    logprobs = np.array(sequence.logprobs[position:], dtype=np.float32).tolist()
    topk = [
        list(zip(ids.tolist(), top.tolist(), strict=True)) for ids, top in sequence.topk[position:]
    ]
    return sequence.tokens[position:], logprobs, topk or None
