"""Sample validation: a request that cannot be sampled is rejected with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from everstep.engine import SampleSpec
from everstep.engine.errors import InputError
from everstep.engine.sampling.validation import check_sample

VOCABULARY = 259
CONTEXT = 32
PROMPT = np.arange(1, 6)


def check(tokens: Any = PROMPT, **fields: Any) -> None:
    spec = SampleSpec(np.asarray(tokens, dtype=np.int64), **fields)
    check_sample(spec, vocab_size=VOCABULARY, max_context_length=CONTEXT)


def targets(*shape: int, value: int = 0) -> np.ndarray[Any, Any]:
    return np.full(shape, value, dtype=np.int64)


GOOD: list[dict[str, Any]] = [
    {},
    {"max_tokens": 27},
    {"max_tokens": 0},
    {"tokens": [0]},
    {"tokens": [258] * 31},
    {"tokens": [1] * 32, "max_tokens": 0},
    {"num_samples": 1024},
    {"temperature": 0},
    {"temperature": 100.0},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": 10**9},
    {"top_p": 1e-9},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"stop_tokens": (0, 258), "stop_strings": ("a", "\n\n")},
    {"topk_prompt_logprobs": 259, "topk_sample_logprobs": 259, "prompt_alt_tokens_k": 259},
    {"prompt_logprobs": True, "prompt_logprobs_last_n": 4},
    {"prompt_logprobs": True, "prompt_logprobs_last_n": 1},
    {"target_prompt_logprobs": targets(4, 7, value=-1)},
    {"target_prompt_logprobs": targets(4, 1, value=258)},
    {"tokens": [1], "target_prompt_logprobs": targets(0, 3)},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_a_valid_request_is_accepted(fields: dict[str, Any]) -> None:
    check(**fields)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tokens": []}, "The prompt is empty"),
    ({"tokens": [1, 259]}, "token id 259 at position 1"),
    ({"tokens": [-1]}, "token id -1 at position 0"),
    ({"tokens": [1, 2**40]}, f"token id {2**40}"),
    ({"num_samples": 0}, "num_samples must be 1 to 1024; got 0"),
    ({"num_samples": -3}, "got -3"),
    ({"num_samples": 1025}, "got 1025"),
    ({"max_tokens": -1}, "max_tokens must be 0 or more; got -1"),
    (
        {"max_tokens": 28},
        "Prompt length plus max_tokens exceeds the model's context window: 5 + 28 > 32",
    ),
    ({"tokens": [1] * 32}, "context window: 32 + 1 > 32"),
    ({"tokens": [1] * 33, "max_tokens": 0}, "context window: 33 + 0 > 32"),
    ({"temperature": -0.1}, "temperature must be 0 or more; got -0.1"),
    ({"seed": 2**63}, r"seed must be -2^63 to 2^63 - 1; got 9223372036854775808"),
    ({"seed": 2**64}, "seed must be"),
    ({"seed": -(2**63) - 1}, "seed must be"),
    ({"temperature": float("nan")}, "got nan"),
    ({"temperature": float("inf")}, "got inf"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
    ({"top_p": 1.01}, "got 1.01"),
    ({"top_p": -1.0}, "got -1.0"),
    ({"top_p": float("nan")}, "got nan"),
    ({"stop_tokens": (3, 259)}, "stop token 259"),
    ({"stop_tokens": (-1,)}, "stop token -1"),
    ({"stop_strings": ("a", "")}, "A stop string is empty"),
    ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs must be 0 to 259; got -1"),
    ({"topk_prompt_logprobs": 260}, "topk_prompt_logprobs must be 0 to 259; got 260"),
    ({"topk_sample_logprobs": 260}, "topk_sample_logprobs must be 0 to 259"),
    ({"prompt_alt_tokens_k": 260}, "prompt_alt_tokens_k must be 0 to 259"),
    ({"prompt_alt_tokens_k": -2}, "got -2"),
    ({"prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n needs prompt_logprobs"),
    ({"prompt_logprobs": True, "prompt_logprobs_last_n": 0}, "must be 1 to 4; got 0"),
    ({"prompt_logprobs": True, "prompt_logprobs_last_n": 5}, "must be 1 to 4; got 5"),
    ({"target_prompt_logprobs": targets(5, 2)}, "must have shape [4, K]; got [5, 2]"),
    ({"target_prompt_logprobs": targets(4)}, "must have shape [4, K]; got [4]"),
    ({"target_prompt_logprobs": targets(4, 2, 1)}, "got [4, 2, 1]"),
    ({"target_prompt_logprobs": targets(4, 2, value=259)}, "ids outside -1 to 258"),
    ({"target_prompt_logprobs": targets(4, 2, value=-2)}, "ids outside -1 to 258"),
    ({"target_prompt_logprobs": np.zeros((4, 2), np.float32)}, "int64 token ids; got float32"),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=str)
def test_an_invalid_request_is_rejected(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check(**fields)
    assert words in str(caught.value)


def test_top_k_logprobs_are_bounded_by_a_thousand() -> None:
    spec = SampleSpec(PROMPT, topk_prompt_logprobs=1001)
    with pytest.raises(InputError, match="must be 0 to 1000; got 1001"):
        check_sample(spec, vocab_size=150_000, max_context_length=CONTEXT)
