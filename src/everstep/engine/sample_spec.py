"""What a sample request asks of the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.wire.outputs import CsrLayout


@dataclass(frozen=True)
class SampleSpec:
    """A sample request.

    Attributes:
        tokens: the prompt, int64 [P].
        num_samples: how many sequences.
        max_tokens: most new tokens of each; None: up to the context's end.
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 or less: all.
        top_p: only the likeliest tokens that together have this probability.
        seed: sample i draws from the stream (seed, i).
        stop_tokens: tokens that end a sequence; they belong to it.
        stop_strings: texts that end a sequence; their tokens belong to it.
        use_eos: whether the model's end tokens end a sequence.
        prompt_logprobs: whether the prompt's logprobs are wanted.
        topk_prompt_logprobs: how many likeliest tokens at each prompt position.
        topk_sample_logprobs: how many at each sampled position.
        target_prompt_logprobs: int64 [P - 1, K], -1 for nothing: ids to score at position i + 1.
        target_layout: where those ids stand, as CSR row pointers and columns; None: everywhere.
            What is said of them has the same layout.
        prompt_alt_tokens_k: how many tokens to draw at each prompt position after the first.
        prompt_logprobs_last_n: score only the last n prompt tokens.
    """

    tokens: np.ndarray[Any, Any]
    num_samples: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    use_eos: bool = True
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: np.ndarray[Any, Any] | None = None
    target_layout: CsrLayout | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
