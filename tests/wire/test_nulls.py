"""Nulls in requests: defaults, except where a number was meant."""

from __future__ import annotations

from typing import Any

import pytest

from everstep.engine.errors import InputError
from everstep.engine.validation import check_pass
from everstep.wire import types
from everstep.wire.base import Request, parse
from everstep.wire.errors import InvalidRequest
from everstep.wire.messages.passes import TrainingPass

CREATION = {"session_id": "s", "model_seq_id": 0}
STEP = {"model_id": "m", "seq_id": 1}
SAMPLE = {"prompt": {"chunks": [{"tokens": [1]}]}}


@pytest.mark.parametrize(
    "name", ["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"]
)
def test_null_for_a_number_of_the_optimizer_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"adam_params\.{name}: a number is required, not"):
        parse(types.OptimStepRequest, {**STEP, "adam_params": {name: None}})


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_null_for_a_number_of_sampling_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name}: a number is required, not null"):
        parse(types.SampleRequest, {**SAMPLE, "sampling_params": {name: None}})


def test_null_in_the_config_of_a_loss_is_refused() -> None:
    content = {"data": [], "loss_fn": "ppo", "loss_fn_config": {"clip_high_threshold": None}}
    with pytest.raises(InvalidRequest, match="clip_high_threshold"):
        parse(types.ForwardBackwardRequest, {**STEP, "forward_backward_input": content})


@pytest.mark.parametrize("data", [[1.0, None], [None, 1.0]])
def test_null_in_a_tensor_is_refused(data: list[Any]) -> None:
    inputs = {
        "target_tokens": {"data": [1, 2], "dtype": "int64"},
        "logprobs": {"data": [-1.0, -1.0], "dtype": "float32"},
        "advantages": {"data": data, "dtype": "float32"},
    }
    datum = {"model_input": {"chunks": [{"tokens": [1, 2]}]}, "loss_fn_inputs": inputs}
    content = {"data": [datum], "loss_fn": "importance_sampling"}
    request = parse(types.ForwardBackwardRequest, {**STEP, "forward_backward_input": content})
    example = TrainingPass.from_request(request).examples
    with pytest.raises(InputError, match=r"advantages.*finite"):
        check_pass(example, "importance_sampling", {}, vocab_size=259, max_context_length=16)


@pytest.mark.parametrize(
    ("model", "content"),
    [
        (types.OptimStepRequest, {**STEP, "adam_params": None, "type": None}),
        (types.CreateModelRequest, {**CREATION, "lora_config": {"seed": None, "rank": None}}),
        (types.CreateModelRequest, {**CREATION, "user_metadata": None, "base_model": None}),
        (types.SampleRequest, {**SAMPLE, "num_samples": None, "sampling_params": None}),
        (types.SampleRequest, {**SAMPLE, "sampling_params": {"max_tokens": None, "stop": None}}),
        (types.SaveWeightsRequest, {**STEP, "path": None, "ttl_seconds": None, "overwrite": None}),
    ],
)
def test_other_nulls_are_defaults(model: type[Request], content: dict[str, Any]) -> None:
    def without_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nulls(each) for key, each in value.items() if each is not None}
        return value

    assert parse(model, content) == parse(model, without_nulls(content))


def test_null_in_metadata_is_kept() -> None:
    session = parse(types.CreateSessionRequest, {"user_metadata": {"note": None}})
    assert session.user_metadata == {"note": None}


def test_null_is_an_error_where_a_request_is_built() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        types.AdamParams(learning_rate=None)
