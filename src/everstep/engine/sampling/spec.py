"""Sample spec: the parameters of a sample request. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.wire.messages.outputs import CsrLayout


@dataclass(frozen=True)
class SampleSpec:
    """Parameters of a sample request.

    Attributes:
        tokens: the prompt, int64 [P].
        num_samples: number of sequences.
        max_tokens: maximum new tokens of a sequence. None: up to the end of the context.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only. 0 or less: from all.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: sample i draws from the stream (seed, i). -2^63 to 2^63 - 1.
        stop_tokens: tokens that end a sequence and belong to it.
        stop_strings: texts that end a sequence. Their tokens belong to it.
        use_eos: whether the model's end tokens end a sequence.
        prompt_logprobs: whether to return the prompt's logprobs.
        topk_prompt_logprobs: number of likeliest tokens to return at each prompt position.
        topk_sample_logprobs: number of likeliest tokens to return at each sampled position.
        target_prompt_logprobs: ids to score at position i + 1, int64 [P - 1, K], where -1 is none.
        target_layout: positions of those ids as CSR row pointers and columns. None: all positions.
            The result has the same layout.
        prompt_alt_tokens_k: number of tokens to draw at each prompt position after the first.
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
