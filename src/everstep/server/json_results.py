"""JSON results: converts results from protobuf to the JSON form of older SDKs.

JSON has no form for NaN and the infinities. They are sent as the strings "NaN", "Infinity" and
"-Infinity", as in protobuf's own JSON. SDKs read them as numbers, so a diverged loss is visible.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import BaseModel

from everstep.wire.codecs.proto import decode_forward_backward_output, decode_sample_response
from everstep.wire.messages.outputs import ForwardBackwardOutput, SampleResponse

Number = float | Literal["NaN", "Infinity", "-Infinity"]


class TensorResult(BaseModel):
    """An array: its flat values and its shape."""

    data: list[Number]
    dtype: Literal["float32", "int64"]
    shape: list[int]


class TrainingPassResult(BaseModel):
    """The result of a training pass: tensors for each datum, metrics ``name:reduction``."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorResult]]
    metrics: dict[str, Number]


class SequenceResult(BaseModel):
    """A sampled sequence, including the tokens that stopped it."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[Number] | None
    topk_logprobs: list[list[tuple[int, Number]] | None] | None


class AltTokensResult(BaseModel):
    """Tokens drawn at every prompt position after the first."""

    tokens: TensorResult
    logprobs: TensorResult


class SampleResult(BaseModel):
    """The result of a sample. A prompt's logprob is null where there is none, as for the first."""

    type: Literal["sample"]
    sequences: list[SequenceResult]
    prompt_logprobs: list[Number | None] | None
    topk_prompt_logprobs: list[list[tuple[int, Number]] | None] | None
    target_prompt_logprobs: TensorResult | None = None
    prompt_alt_tokens: AltTokensResult | None = None
    prompt_cache_hit_tokens: int = 0


def json_result(kind: str, body: bytes) -> dict[str, Any]:
    """Convert the protobuf result of a sample or a training pass to JSON."""
    if kind == "sample":
        content = _sample(decode_sample_response(body))
    else:
        content = _pass(decode_forward_backward_output(body))
    finite: dict[str, Any] = _finite(content)
    return finite


def json_result_bytes(kind: str, body: bytes) -> bytes:
    """Convert a result as `json_result` does, and encode it as FastAPI encodes a response."""
    content = json_result(kind, body)
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


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
        "prompt_cache_hit_tokens": response.prompt_cache_hit_tokens,
    }
    if response.target_prompt_logprobs is not None:
        content["target_prompt_logprobs"] = response.target_prompt_logprobs.to_dict()
    if response.prompt_alt_tokens is not None:
        content["prompt_alt_tokens"] = {
            "tokens": response.prompt_alt_tokens.tokens.to_dict(),
            "logprobs": response.prompt_alt_tokens.logprobs.to_dict(),
        }
    return content


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else _name(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
