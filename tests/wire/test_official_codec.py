"""Protobuf compatibility with the official SDK: descriptors, encoder and decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import tinker.types
import torch
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker.proto import request_conv, response_conv, tinker_public_pb2

import everstep.types
from everstep.wire.codecs import everstep_pb2, proto
from everstep.wire.messages.outputs import SampleOutput, SequenceOutput, Stop, TopkOutput

ROOTS = ("ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse")
UNREAD = {"ImageChunk.override_dimensions"}
"""Fields that the SDK describes and never sends."""
VARINTS = (
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT32,
    FieldDescriptor.TYPE_BOOL,
)
"""Types with the same encoding on the wire, whose width the reader chooses."""


def different(theirs: Descriptor, ours: Descriptor) -> set[str]:
    """Return the official fields that ours lacks or encodes differently, whatever their names."""
    found: set[str] = set()
    for number, field in theirs.fields_by_number.items():
        own = ours.fields_by_number.get(number)
        same = own is not None and (
            field.is_repeated == own.is_repeated
            and field.has_presence == own.has_presence
            and (field.type == own.type or {field.type, own.type} <= set(VARINTS))
        )
        if own is None or not same:
            found.add(f"{theirs.name}.{field.name}")
        elif field.message_type is not None:
            assert own.message_type is not None
            found |= different(field.message_type, own.message_type)
        elif field.enum_type is not None:
            assert own.enum_type is not None
            enums = (field.enum_type, own.enum_type)
            values = [{v.number: v.name for v in enum.values} for enum in enums]
            assert values[0] and values[0] == values[1]
    return found


def test_every_field_has_the_official_number_and_encoding() -> None:
    found: set[str] = set()
    for name in ROOTS:
        theirs = tinker_public_pb2.DESCRIPTOR.message_types_by_name[name]
        ours = everstep_pb2.DESCRIPTOR.message_types_by_name[name]
        assert {f.number for f in ours.fields} <= {f.number for f in theirs.fields}
        found |= different(theirs, ours)
    assert found == UNREAD


# Requests

floats = st.floats(width=32, allow_nan=False)
names = st.sampled_from(["target_tokens", "weights", "advantages", "logprobs"])
ids = hnp.arrays(np.int64, hnp.array_shapes(max_dims=2, max_side=6), elements=st.integers(0, 5))
reals = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=6), elements=floats)
chunks = st.one_of(
    st.builds(lambda t: ("EncodedTextChunk", {"tokens": t}), st.lists(st.integers(0, 2**31 - 1))),
    st.builds(
        lambda d, e: ("ImageChunk", {"data": d, "format": "png", "expected_tokens": e}),
        st.binary(max_size=9),
        st.one_of(st.none(), st.integers(1, 99)),
    ),
)
data = st.lists(
    st.tuples(
        st.lists(chunks, min_size=1, max_size=3),
        st.dictionaries(names, st.one_of(ids, reals), max_size=3),
    ),
    max_size=3,
)
configs = st.none() | st.dictionaries(
    st.text(max_size=4), st.floats(allow_nan=False, allow_infinity=False), max_size=3
)


def datum(types: Any, parts: Any, tensors: Any, *, sparse: bool) -> Any:
    make = types.TensorData
    return types.Datum(
        model_input=types.ModelInput(chunks=[getattr(types, n)(**fields) for n, fields in parts]),
        loss_fn_inputs={
            name: torch.from_numpy(array) if sparse else make.from_numpy(array)
            for name, array in tensors.items()
        },
    )


def request(types: Any, made: Any, config: Any, *, sparse: bool) -> Any:
    return types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(
            data=[datum(types, parts, tensors, sparse=sparse) for parts, tensors in made],
            loss_fn="ppo",
            loss_fn_config=config,
        ),
        model_id="session:train:0",
        seq_id=7,
    )


@given(data, configs, st.booleans())
def test_client_encodes_requests_like_the_official_one(
    made: Any, config: Any, sparse: bool
) -> None:
    theirs = request_conv.forward_backward_request_to_proto(
        request(tinker.types, made, config, sparse=sparse)
    )
    ours = proto.encode_forward_backward_request(
        request(everstep.types, made, config, sparse=sparse)
    )
    assert tinker_public_pb2.ForwardBackwardRequest.FromString(ours) == theirs


@given(data, configs, st.booleans())
def test_service_decodes_requests_of_the_official_client(
    made: Any, config: Any, sparse: bool
) -> None:
    message = request_conv.forward_backward_request_to_proto(
        request(tinker.types, made, config, sparse=sparse)
    )
    read = proto.decode_training_pass(message.SerializeToString())
    assert (read.model_id, read.seq_id, read.loss_fn) == ("session:train:0", 7, "ppo")
    assert read.loss_fn_config == (config or {})
    for example, (parts, tensors) in zip(read.examples, made, strict=True):
        text = [token for _, fields in parts for token in fields.get("tokens", [])]
        assert example.tokens.tolist() == text
        assert example.media == ("image",) * sum("data" in fields for _, fields in parts)
        assert example.inputs.keys() == tensors.keys()
        for name, array in tensors.items():
            assert example.inputs[name].dtype == array.dtype
            assert np.array_equal(example.inputs[name], array)


# Samples


def rows(dtype: Any, *shape: int) -> Any:
    elements = floats if dtype is np.float32 else st.integers(0, 2**31 - 1)
    return hnp.arrays(dtype, shape, elements=elements)


@st.composite
def topks(draw: Any, length: int) -> TopkOutput:
    k = draw(st.integers(1, 3))
    return TopkOutput(draw(rows(np.int32, length, k)), draw(rows(np.float32, length, k)))


@st.composite
def samples(draw: Any) -> SampleOutput:
    def sequence() -> SequenceOutput:
        length = draw(st.integers(0, 4))
        return SequenceOutput(
            draw(rows(np.int32, length)),
            draw(rows(np.float32, length)),
            draw(st.sampled_from(list(Stop))),
            draw(st.none() | topks(length)) if length else None,
        )

    prompt = draw(st.integers(2, 5))
    return SampleOutput(
        [sequence() for _ in range(draw(st.integers(1, 3)))],
        prompt_logprobs=draw(st.none() | rows(np.float32, prompt)),
        topk_prompt=draw(st.none() | topks(prompt)),
        target_prompt_logprobs=draw(st.none() | rows(np.float32, prompt - 1, 2)),
        prompt_alt=draw(st.none() | topks(prompt - 1)),
    )


@given(samples())
def test_official_client_decodes_samples_like_ours(made: SampleOutput) -> None:
    encoded = proto.encode_sample_response(made)
    theirs = response_conv.deserialize_sample_response(encoded)
    ours = proto.decode_sample_response(encoded)
    for one, other, sequence in zip(theirs.sequences, ours.sequences, made.sequences, strict=True):
        assert one.stop_reason == other.stop_reason == sequence.stop_reason.value
        assert list(one.tokens) == other.tokens == sequence.tokens.tolist()
        assert one.logprobs == other.logprobs == (sequence.logprobs.tolist() or None)
        assert one.topk_logprobs == other.topk_logprobs
        assert (one.topk_logprobs is None) == (sequence.topk is None)
    assert theirs.prompt_logprobs == ours.prompt_logprobs
    assert theirs.topk_prompt_logprobs == ours.topk_prompt_logprobs
    for name, given_array in (
        ("target_prompt_logprobs", made.target_prompt_logprobs),
        ("prompt_alt_tokens", made.prompt_alt),
    ):
        one, other = getattr(theirs, name), getattr(ours, name)
        assert (one is None) == (other is None) == (given_array is None)
    if made.target_prompt_logprobs is not None:
        assert theirs.target_prompt_logprobs is not None
        assert np.array_equal(theirs.target_prompt_logprobs.to_numpy(), made.target_prompt_logprobs)
    if made.prompt_alt is not None:
        assert theirs.prompt_alt_tokens is not None
        assert np.array_equal(theirs.prompt_alt_tokens.tokens.to_numpy(), made.prompt_alt.token_ids)
