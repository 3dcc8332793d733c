"""Sample specs: translate a sample request into the engine's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from everstep.engine.sampling.spec import SampleSpec
from everstep.wire import types
from everstep.wire.messages.outputs import CsrLayout
from everstep.worker.protocol.errors import OperationFailed


def sample_spec(payload: Mapping[str, Any], default_seed: int) -> SampleSpec:
    """Return the engine's form of a sample request.

    Args:
        payload: the request as JSON, as the ledger keeps it.
        default_seed: the seed of a request that names none.

    Raises:
        OperationFailed: the prompt holds something other than text tokens.
    """
    request = types.SampleRequest.model_validate(dict(payload))
    params = request.sampling_params
    stop = params.stop
    if isinstance(stop, str):
        stop = [stop]
    targets = request.target_prompt_logprobs
    return SampleSpec(
        tokens=_prompt_tokens(request.prompt),
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed if params.seed is not None else default_seed,
        stop_tokens=tuple(token for token in stop or () if isinstance(token, int)),
        stop_strings=tuple(text for text in stop or () if isinstance(text, str)),
        use_eos=stop is None,
        prompt_logprobs=bool(request.prompt_logprobs),
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        target_prompt_logprobs=None if targets is None else targets.to_numpy(pad_value=-1),
        target_layout=None if targets is None else _layout(targets),
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
    )


def _layout(targets: types.TensorData) -> CsrLayout | None:
    if targets.sparse_crow_indices is None:
        return None
    return targets.sparse_crow_indices, targets.sparse_col_indices or []


def _prompt_tokens(prompt: types.ModelInput) -> np.ndarray:
    tokens: list[int] = []
    for index, chunk in enumerate(prompt.chunks):
        if not isinstance(chunk, types.EncodedTextChunk):
            raise OperationFailed(
                f"prompt chunk {index} is of type {chunk.type!r}: the models served here take "
                "text only."
            )
        tokens.extend(chunk.tokens)
    return np.asarray(tokens, dtype=np.int64)
