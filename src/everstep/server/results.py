"""Results that are kept as protobuf, in the JSON form of older SDKs."""

from __future__ import annotations

import math
from typing import Any

from everstep.wire.outputs import ForwardBackwardOutput, SampleResponse
from everstep.wire.proto import decode_forward_backward_output, decode_sample_response


def json_result(kind: str, body: bytes) -> dict[str, Any]:
    """Convert a result of a sample or a training pass."""
    if kind == "sample":
        return _sample(decode_sample_response(body))
    return _pass(decode_forward_backward_output(body))


def _pass(output: ForwardBackwardOutput) -> dict[str, Any]:
    return {
        "loss_fn_output_type": output.loss_fn_output_type,
        "loss_fn_outputs": [
            {name: tensor.to_dict() for name, tensor in row.items()}
            for row in output.loss_fn_outputs
        ],
        "metrics": output.metrics,
    }


def _sample(response: SampleResponse) -> dict[str, Any]:
    content: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": sequence.stop_reason,
                "tokens": sequence.tokens,
                "logprobs": sequence.logprobs,
                "topk_logprobs": sequence.topk_logprobs,
            }
            for sequence in response.sequences
        ],
        "prompt_logprobs": response.prompt_logprobs,
        "topk_prompt_logprobs": response.topk_prompt_logprobs,
    }
    if response.target_prompt_logprobs is not None:
        content["target_prompt_logprobs"] = response.target_prompt_logprobs.to_dict()
    if response.prompt_alt_tokens is not None:
        content["prompt_alt_tokens"] = {
            "tokens": response.prompt_alt_tokens.tokens.to_dict(),
            "logprobs": response.prompt_alt_tokens.logprobs.to_dict(),
        }
    finite: dict[str, Any] = _finite(content)
    return finite


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
