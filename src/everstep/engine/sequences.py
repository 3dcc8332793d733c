"""The sequences of one sample request: what was drawn, and when each ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from everstep.engine import choice
from everstep.engine.attention import KvCache
from everstep.engine.errors import InputError
from everstep.engine.sample_spec import SampleSpec
from everstep.engine.state import Adapter
from everstep.wire.outputs import Stop
from everstep.wire.proto import SampleOutput, SequenceOutput, TopkOutput
from everstep.wire.streams import DrawnTokens, Grown, drawn_since

Array = np.ndarray[Any, Any]
_CONTEXT_TOKENS = 8
"""Tokens before a stop string that are decoded with it, so that split characters come out whole."""


@dataclass
class Drawn:
    """One sequence as it grows."""

    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[tuple[Array, Array]] = field(default_factory=list)
    stop: Stop | None = None


class Sampled:
    """A request on its way.

    Args:
        key: the caller's name for it.
        spec: what is asked.
        adapter: what it samples with; None: the base model.
        limit: most new tokens.
        eos: the model's end tokens.
        tokenizer: decodes for stop strings.
        space: requests of one space reuse one another's prompts; None: nobody's.
    """

    def __init__(
        self,
        key: str,
        spec: SampleSpec,
        adapter: Adapter | None,
        limit: int,
        eos: tuple[int, ...],
        tokenizer: Any,
        space: str | None = None,
    ) -> None:
        self.key = key
        self.spec = spec
        self.adapter = adapter
        self.space = space
        self.cache = KvCache()
        self.prompt: dict[str, Any] = {}
        self._limit = limit
        self._ends = frozenset(spec.stop_tokens) | (frozenset(eos) if spec.use_eos else frozenset())
        self._tokenizer = tokenizer
        self._sequences = [Drawn(choice.stream(spec.seed, i)) for i in range(spec.num_samples)]
        self.alive = list(self._sequences) if limit else []
        for sequence in self._sequences:
            sequence.stop = None if limit else Stop.LENGTH

    @property
    def position(self) -> int:
        """Where the alive sequences' last token stands."""
        return len(self.spec.tokens) + len(self.alive[0].tokens) - 1

    def draw(self, logits: Array) -> list[int]:
        """Draw a token for each alive sequence.

        Args:
            logits: float32 [alive, V], or [1, V] for all of them.

        Returns:
            Rows of the alive sequences that go on.
        """
        going = []
        for row, sequence in enumerate(self.alive):
            self._draw_one(sequence, logits[row if len(logits) > 1 else 0])
            if sequence.stop is None:
                going.append(row)
        self.alive = [self.alive[row] for row in going]
        return going

    def drawn(self, position: int) -> list[DrawnTokens]:
        """What was drawn from a position on."""
        return drawn_since(position, [_grown(sequence) for sequence in self._sequences])

    def output(self) -> SampleOutput:
        """What came of it."""
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

    def _draw_one(self, sequence: Drawn, logits: Array) -> None:
        if not np.isfinite(logits).all():
            raise InputError(
                "The model's logits are not finite: this adapter has diverged; sample from an "
                "earlier checkpoint."
            )
        token = choice.choose(logits, self.spec, sequence.random)
        logprobs = choice.log_softmax(logits)
        sequence.tokens.append(token)
        sequence.logprobs.append(float(logprobs[token]))
        if self.spec.topk_sample_logprobs:
            sequence.topk.append(choice.likeliest(logprobs, self.spec.topk_sample_logprobs))
        if token in self._ends or self._said_stop(sequence.tokens):
            sequence.stop = Stop.STOP
        elif len(sequence.tokens) >= self._limit:
            sequence.stop = Stop.LENGTH

    def _said_stop(self, tokens: list[int]) -> bool:
        """Whether the last token completes a stop string."""
        if not self.spec.stop_strings:
            return False
        reach = max(len(text.encode()) for text in self.spec.stop_strings) + _CONTEXT_TOKENS
        tail: str = self._tokenizer.decode(tokens[-reach:], clean_up_tokenization_spaces=False)
        return any(text in tail for text in self.spec.stop_strings)

    def _topk(self, sequence: Drawn, k: int) -> TopkOutput:
        return choice.stacked(sequence.topk, k)


def _grown(sequence: Drawn) -> Grown:
    """A sequence as it is streamed: in float32, as it will be in the output."""
    logprobs = np.array(sequence.logprobs, dtype=np.float32).tolist()
    topk = [list(zip(ids.tolist(), top.tolist(), strict=True)) for ids, top in sequence.topk]
    return sequence.tokens, logprobs, topk or None
