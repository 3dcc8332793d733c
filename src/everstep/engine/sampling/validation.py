"""Sample validation: rejects a request that cannot be sampled before it is accepted. No torch."""

from __future__ import annotations

import math

from everstep.engine.config import MAX_SEED, MIN_SEED
from everstep.engine.errors import InputError
from everstep.engine.sampling.spec import SampleSpec
from everstep.engine.validation import check_tokens

MAX_SAMPLES = 1024
MAX_TOP_K = 1000


def check_sample(spec: SampleSpec, *, vocab_size: int, max_context_length: int) -> None:
    """Raise `InputError` for a request that cannot be sampled. The message says why."""
    length = len(spec.tokens)
    if length == 0:
        raise InputError("The prompt is empty; give at least one token.")
    check_tokens(spec.tokens, vocab_size, "prompt")
    if not 1 <= spec.num_samples <= MAX_SAMPLES:
        raise InputError(f"num_samples must be 1 to {MAX_SAMPLES}; got {spec.num_samples}.")
    if spec.max_tokens is not None and spec.max_tokens < 0:
        raise InputError(f"max_tokens must be 0 or more; got {spec.max_tokens}.")
    new_tokens = spec.max_tokens if spec.max_tokens is not None else 1
    if length + new_tokens > max_context_length:
        raise InputError(
            "Prompt length plus max_tokens exceeds the model's context window: "
            f"{length} + {new_tokens} > {max_context_length}"
        )
    if not (spec.temperature >= 0 and math.isfinite(spec.temperature)):
        raise InputError(f"temperature must be 0 or more; got {spec.temperature}.")
    if not 0 < spec.top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1; got {spec.top_p}.")
    if not MIN_SEED <= spec.seed <= MAX_SEED:
        raise InputError(f"seed must be -2^63 to 2^63 - 1; got {spec.seed}.")
    for token in spec.stop_tokens:
        if not 0 <= token < vocab_size:
            raise InputError(f"stop token {token} is not in the vocabulary of {vocab_size}.")
    if "" in spec.stop_strings:
        raise InputError("A stop string is empty; every sequence would stop at its first token.")
    _check_prompt_scores(spec, length, vocab_size)


def _check_prompt_scores(spec: SampleSpec, length: int, vocab_size: int) -> None:
    limit = min(MAX_TOP_K, vocab_size)
    for field in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        value = getattr(spec, field)
        if not 0 <= value <= limit:
            raise InputError(f"{field} must be 0 to {limit}; got {value}.")
    last_n = spec.prompt_logprobs_last_n
    if last_n is not None:
        if not spec.prompt_logprobs:
            raise InputError("prompt_logprobs_last_n needs prompt_logprobs.")
        if not 1 <= last_n <= length - 1:
            raise InputError(f"prompt_logprobs_last_n must be 1 to {length - 1}; got {last_n}.")
    targets = spec.target_prompt_logprobs
    if targets is None:
        return
    if targets.ndim != 2 or len(targets) != length - 1:
        raise InputError(
            f"target_prompt_logprobs must have shape [{length - 1}, K]; got {list(targets.shape)}."
        )
    if targets.dtype.kind != "i":
        raise InputError(f"target_prompt_logprobs must be int64 token ids; got {targets.dtype}.")
    if targets.size and (targets.min() < -1 or targets.max() >= vocab_size):
        raise InputError(f"target_prompt_logprobs holds ids outside -1 to {vocab_size - 1}.")
