"""Fields that mean something and that no message has are refused, wherever they are."""

from __future__ import annotations

from typing import Any

import pytest

from everstep.wire import types
from everstep.wire.codecs import everstep_pb2 as pb
from everstep.wire.codecs import unknown
from everstep.wire.codecs.proto import decode_request
from everstep.wire.errors import InvalidRequest

RUN = {"model_id": "m", "seq_id": 1}
ADAM = types.OptimStepRequest
CREATE = types.CreateModelRequest
SAMPLE = types.SampleRequest
PASS = types.ForwardBackwardRequest


def create(**lora: Any) -> dict[str, Any]:
    return {"session_id": "s", "model_seq_id": 0, "base_model": "m", "lora_config": lora}


def sample(params: dict[str, Any], **more: Any) -> dict[str, Any]:
    prompt = {"chunks": [{"tokens": [1]}]}
    return {"prompt": prompt, "sampling_params": params, "sampling_session_id": "s", **more}


def training_pass(datum: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    chunk = {"tokens": [1], **more.pop("chunk", {})}
    data = [{"model_input": {"chunks": [chunk]}, "loss_fn_inputs": {}, **(datum or {})}]
    return {**RUN, "forward_backward_input": {"data": data, "loss_fn": "cross_entropy", **more}}


@pytest.mark.parametrize(
    ("model", "body", "name"),
    [
        (ADAM, {**RUN, "adam_params": {"lr": 1e-3}}, "lr"),
        (ADAM, {**RUN, "adam_params": {"learning_rate": 1e-3, "betas": [0.9, 0.95]}}, "betas"),
        (ADAM, {**RUN, "learning_rate": 1e-3}, "learning_rate"),
        (CREATE, create(rank=8, alpha=16), "alpha"),
        (CREATE, create(rank=8, dropout=0.1), "dropout"),
        (CREATE, {**create(), "seed": 3}, "seed"),
        (SAMPLE, sample({"max_tokens": 2, "min_p": 0.1}), "min_p"),
        (SAMPLE, sample({"max_tokens": 2}, temperature=0.0), "temperature"),
        (PASS, training_pass(weight=2.0), "weight"),
        (PASS, training_pass({"weights": [1.0]}), "weights"),
        (PASS, training_pass(chunk={"mask": [1]}), "mask"),
    ],
)
def test_unknown_field_is_refused_by_name(model: Any, body: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"there is no field '{name}'"):
        types.parse(model, body)


@pytest.mark.parametrize("nothing", [None, False, "", [], {}])
def test_unknown_field_that_is_off_asks_for_nothing(nothing: object) -> None:
    params = {"learning_rate": 1e-3, "from_a_newer_sdk": nothing}
    step = types.parse(ADAM, {**RUN, "adam_params": params, "another": nothing})
    assert step.adam_params == types.AdamParams(learning_rate=1e-3)


def test_zero_is_not_off() -> None:
    with pytest.raises(InvalidRequest, match="'lr'"):
        types.parse(ADAM, {**RUN, "adam_params": {"lr": 0}})


def test_newer_client_may_send_more_in_a_request_but_not_in_its_parts() -> None:
    body = {**RUN, "adam_params": {"learning_rate": 1e-3}, "later": 1}
    assert types.parse(ADAM, body, newer_client=True).adam_params is not None
    with pytest.raises(InvalidRequest, match="'later'"):
        types.parse(ADAM, body)
    body = {**RUN, "adam_params": {"later": 1}}
    with pytest.raises(InvalidRequest, match="'later'"):
        types.parse(ADAM, body, newer_client=True)


def test_telemetry_and_sessions_take_any_field() -> None:
    found = types.parse(types.CreateSessionRequest, {"tags": ["a"], "launcher": "x"})
    assert found.tags == ["a"]


def test_future_can_be_sent_back_whole() -> None:
    future = types.UntypedAPIFuture(request_id="r", model_id="m").model_dump(mode="json")
    assert types.parse(types.FutureRetrieveRequest, future).request_id == "r"


@pytest.mark.parametrize(
    ("model", "body", "name"),
    [
        (ADAM, {**RUN, "adam_params": {"learning_rate": True}}, "learning_rate"),
        (CREATE, create(rank=True), "rank"),
        (CREATE, create(seed=False), "seed"),
        (SAMPLE, sample({"max_tokens": True}), "max_tokens"),
        (PASS, training_pass(loss_fn_config={"clip": True}), "loss_fn_config"),
    ],
)
def test_boolean_is_no_number(model: Any, body: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name} takes a number; got (true|false)"):
        types.parse(model, body)


def test_boolean_is_no_number_for_the_client_either() -> None:
    with pytest.raises(ValueError, match="learning_rate takes a number; got true"):
        types.AdamParams(learning_rate=True)


# Protobuf

NUMBER = b"\x78\x05"
"""Field 15, a number, which no message has."""
OFF = {"zero": b"\x78\x00", "empty": b"\x7a\x00", "fixed": b"\x79" + bytes(8)}


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def protobuf_pass(
    more: bytes = b"",
    datum: bytes = b"",
    chunk: bytes = b"",
    text: bytes = b"",
    image: bytes = b"",
    tensor: bytes = b"",
    setting: bytes = b"",
) -> bytes:
    """A pass, with further bytes in each of its parts."""
    inputs = pb.Tensor(dense=bytes(8), dtype=pb.DTYPE_INT64, shape=[1]).SerializeToString()
    words = field(1, field(1, bytes(4)) + text) + chunk
    media = field(2, field(2, b"png") + image)
    parts = field(1, words) + (field(1, media) if image else b"")
    named = field(2, field(1, b"target_tokens") + field(2, inputs + tensor))
    config = field(7, field(1, b"beta") + field(2, b"\x09" + bytes(8) + setting))
    head = pb.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="ppo").SerializeToString()
    return head + field(3, parts + named + datum) + config + more


@pytest.fixture(params=["measured", "searched"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small messages are measured first, large ones are not."""
    if request.param == "searched":
        monkeypatch.setattr(unknown, "_MEASURED_BYTES", 0)


PARTS = {
    "more": "ForwardBackwardRequest",
    "datum": "Datum",
    "chunk": "Chunk",
    "text": "EncodedTextChunk",
    "tensor": "Tensor",
    "setting": "LossConfigValue",
}


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("part", PARTS)
def test_unknown_field_of_a_protobuf_pass_is_refused_by_its_number(part: str) -> None:
    content = protobuf_pass(**{part: NUMBER})
    with pytest.raises(InvalidRequest, match=f"{PARTS[part]} has no field number 15; it has") as no:
        decode_request(content)
    assert (no.value.model_id, no.value.seq_id) == ("m", 1), "its future fails"
    if part != "more":
        with pytest.raises(InvalidRequest, match="no field number 15"):
            decode_request(content, newer_client=True)


@pytest.mark.usefixtures("size")
def test_newer_client_may_send_more_in_a_protobuf_pass() -> None:
    passed = decode_request(protobuf_pass(NUMBER), newer_client=True)
    assert (passed.loss_fn, len(passed.examples)) == ("ppo", 1)


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("nothing", OFF.values(), ids=OFF)
@pytest.mark.parametrize("part", PARTS)
def test_unknown_field_of_a_protobuf_pass_that_is_off_asks_for_nothing(
    part: str, nothing: bytes
) -> None:
    passed = decode_request(protobuf_pass(**{part: nothing}))
    assert passed.loss_fn_config == {"beta": 0.0}
    assert passed.examples[0].inputs["target_tokens"].tolist() == [0]


@pytest.mark.usefixtures("size")
def test_pass_with_an_image_is_refused_for_that_whatever_the_image_has() -> None:
    assert decode_request(protobuf_pass(image=NUMBER)).examples[0].media == ("image",)


@pytest.mark.usefixtures("size")
def test_unusual_encoding_of_known_fields_is_read() -> None:
    twice = protobuf_pass() + field(4, b"cispo") + b"\x30\x00"
    assert decode_request(twice).loss_fn == "cispo"
