"""``loss_fn_config`` in every form: numbers and text, in protobuf's two maps and in JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from everstep.engine.errors import InputError
from everstep.engine.validation import check_pass
from everstep.wire import types
from everstep.wire.base import parse
from everstep.wire.codecs import everstep_pb2 as pb
from everstep.wire.codecs.proto import decode_training_pass, encode_training_pass
from everstep.wire.errors import InvalidRequest
from everstep.wire.messages.passes import TrainingPass

IDS = [1, 2, 3]


def message(old: dict[str, float], new: dict[str, float | str]) -> bytes:
    request = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="ppo")
    request.loss_fn_config.update(old)
    for key, value in new.items():
        if isinstance(value, str):
            request.loss_fn_config_v2[key].text = value
        else:
            request.loss_fn_config_v2[key].number = value
    return request.SerializeToString()


def in_json(config: Any) -> TrainingPass:
    inputs = {
        "target_tokens": {"data": IDS, "dtype": "int64"},
        "logprobs": {"data": [-1.0] * 3, "dtype": "float32"},
        "advantages": {"data": [1.0] * 3, "dtype": "float32"},
    }
    datum = {"model_input": {"chunks": [{"tokens": IDS}]}, "loss_fn_inputs": inputs}
    body = {"data": [datum], "loss_fn": "ppo", "loss_fn_config": config}
    request = {"forward_backward_input": body, "model_id": "m", "seq_id": 1}
    return TrainingPass.from_request(parse(types.ForwardBackwardRequest, request))


def check(request: TrainingPass) -> None:
    config = request.loss_fn_config
    check_pass(request.examples, "ppo", config, vocab_size=259, max_context_length=16)


@pytest.mark.parametrize(
    ("old", "new", "read"),
    [
        ({"a": 1.0}, {}, {"a": 1.0}),
        ({}, {"a": 2.0, "b": "x"}, {"a": 2.0, "b": "x"}),
        ({"a": 1.0, "c": 3.0}, {"a": 2.0}, {"a": 2.0, "c": 3.0}),
        ({"a": 1.0}, {"a": "text"}, {"a": "text"}),
        ({}, {"a": ""}, {"a": ""}),
        ({}, {"a": 0.0}, {"a": 0.0}),
    ],
)
def test_newer_config_map_takes_precedence_by_key(old: Any, new: Any, read: Any) -> None:
    request = decode_training_pass(message(old, new))
    assert request.loss_fn_config == read
    assert decode_training_pass(encode_training_pass(request)).loss_fn_config == read


def test_json_and_protobuf_give_the_same_pass() -> None:
    numbers = {"clip_low_threshold": 0.5, "clip_high_threshold": 2}
    request = in_json(numbers)
    assert request.loss_fn_config == numbers
    assert decode_training_pass(encode_training_pass(request)).loss_fn_config == numbers
    check(request)
    check(in_json(None))


@pytest.mark.parametrize("value", ["0.5", "", "nan"])
def test_config_value_that_is_no_number_is_rejected_by_key(value: Any) -> None:
    with pytest.raises(InputError, match=r"loss_fn_config\['clip_high_threshold'\] must be a fin"):
        check(in_json({"clip_high_threshold": value}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_config_value_that_is_not_finite_is_rejected_by_key(value: float) -> None:
    with pytest.raises(InvalidRequest, match=r"loss_fn_config\.clip_high_threshold"):
        in_json({"clip_high_threshold": value})
    encoded = decode_training_pass(message({"clip_high_threshold": value}, {}))
    with pytest.raises(InputError, match=r"loss_fn_config\['clip_high_threshold'\] must be a fin"):
        check(replace(encoded, examples=in_json(None).examples))


@pytest.mark.parametrize("value", [[1.0], {"number": 1.0}])
def test_config_value_of_another_type_is_rejected_by_key(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"loss_fn_config\.clip_high_threshold"):
        in_json({"clip_high_threshold": value})


def test_unknown_config_key_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'beta'.*unknown to ppo.*clip_low_threshold"):
        check(in_json({"beta": 1.0}))
