"""Validation of samples: the arguments of a request, and whether the response honours them."""

from __future__ import annotations

from dataclasses import replace

from everstep.wire import types


def check_request(
    target_prompt_logprobs: types.TensorData | None,
    prompt_alt_tokens_k: int,
    prompt_logprobs_last_n: int | None,
    include_prompt_logprobs: bool,
) -> None:
    """Raise ValueError for arguments that a service would refuse. See `SamplingClient.sample`."""
    if target_prompt_logprobs is not None:
        shape = target_prompt_logprobs.shape
        if target_prompt_logprobs.dtype != "int64" or shape is None or len(shape) != 2:
            raise ValueError(
                "target_prompt_logprobs has to be an int64 tensor [len(prompt) - 1, K]; got "
                f"{target_prompt_logprobs.dtype} {shape}"
            )
    if prompt_alt_tokens_k < 0:
        raise ValueError(f"prompt_alt_tokens_k has to be 0 or greater; got {prompt_alt_tokens_k}")
    if prompt_logprobs_last_n is None:
        return
    if prompt_logprobs_last_n < 1:
        raise ValueError(
            f"prompt_logprobs_last_n has to be 1 or greater; got {prompt_logprobs_last_n}"
        )
    if not include_prompt_logprobs:
        raise ValueError("prompt_logprobs_last_n needs include_prompt_logprobs=True")


def check_response(request: types.SampleRequest, response: types.SampleResponse) -> None:
    """Raise RuntimeError if an older service ignored a part of the request."""
    if request.prompt_alt_tokens_k > 0 and response.prompt_alt_tokens is None:
        raise RuntimeError("the service returned no prompt_alt_tokens: it does not support them")
    import numpy as np

    last, scored = request.prompt_logprobs_last_n, response.prompt_logprobs_np
    if last is None or scored is None:
        return
    if not bool(np.isnan(scored[: len(scored) - last]).all()):
        raise RuntimeError(
            "the service scored more of the prompt than prompt_logprobs_last_n: it does not "
            "support that argument"
        )


def with_sequence_ids(
    future: types.UntypedAPIFuture, response: types.SampleResponse
) -> types.SampleResponse:
    """Return a response with the sequences' ids and the seed from the submit's response."""
    ids = future.sample_sequence_ids or [""] * len(response.sequences)
    sequences = [
        replace(sequence, sequence_id=name)
        for sequence, name in zip(response.sequences, ids, strict=True)
    ]
    return replace(response, sequences=sequences, seed=future.sample_seed)
