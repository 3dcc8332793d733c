"""Codecs: round trips, and the official SDK's own codec on the other side."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker import types as sdk
from tinker.proto import request_conv, response_conv

from everstep.wire import types
from everstep.wire.codecs import proto
from everstep.wire.codecs.body import decompress, head
from everstep.wire.errors import BodyTooLarge, InvalidRequest
from everstep.wire.messages.outputs import Stop

floats = st.floats(width=32, allow_nan=False)
names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8)
arrays = st.one_of(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, min_side=1, max_side=5), elements=floats),
    hnp.arrays(np.int64, hnp.array_shapes(max_dims=2, min_side=1, max_side=5)),
)
examples = st.builds(
    proto.Example,
    hnp.arrays(np.int64, st.integers(0, 9), elements=st.integers(-(2**31), 2**31 - 1)),
    st.dictionaries(names, arrays, max_size=3),
)
passes = st.builds(
    proto.TrainingPass,
    names,
    st.integers(1, 2**60),
    st.lists(examples, max_size=4),
    names,
    st.dictionaries(names, st.one_of(st.floats(allow_nan=False), names), max_size=3),
    st.booleans(),
)


@given(passes)
def test_training_pass_survives_a_round_trip(original: proto.TrainingPass) -> None:
    encoded = proto.encode_training_pass(original)
    decoded = proto.decode_training_pass(encoded)
    assert proto.encode_training_pass(decoded) == encoded
    assert (decoded.model_id, decoded.seq_id) == (original.model_id, original.seq_id)
    assert decoded.loss_fn_config == original.loss_fn_config
    for one, other in zip(original.examples, decoded.examples, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert one.inputs.keys() == other.inputs.keys()
        for name, array in one.inputs.items():
            assert other.inputs[name].dtype == array.dtype
            assert np.array_equal(other.inputs[name], array)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_raise_only_invalid_request(body: bytes) -> None:
    for decode in (
        proto.decode_training_pass,
        proto.decode_forward_backward_output,
        proto.decode_sample_response,
    ):
        with contextlib.suppress(InvalidRequest):
            decode(body)


def test_official_requests_can_be_decoded() -> None:
    targets = torch.zeros(6, 8, dtype=torch.int64)
    targets[2, 3] = 9
    inputs: Any = {"target_tokens": targets, "weights": (targets > 0).float()}  # are converted
    datum = sdk.Datum(
        model_input=sdk.ModelInput.from_ints([1, 2, 3, 4, 5, 6]),
        loss_fn_inputs=inputs,
    )
    body = sdk.ForwardBackwardRequest(
        forward_backward_input=sdk.ForwardBackwardInput(
            data=[datum], loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.5}
        ),
        model_id="m",
        seq_id=7,
    )
    message = request_conv.forward_backward_request_to_proto(body)
    decoded = proto.decode_training_pass(message.SerializeToString())
    assert (decoded.model_id, decoded.seq_id, decoded.loss_fn) == ("m", 7, "ppo")
    assert decoded.loss_fn_config == {"clip_low_threshold": 0.5}
    assert decoded.examples[0].tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(decoded.examples[0].inputs["target_tokens"], targets.numpy())
    assert decoded.examples[0].inputs["weights"].dtype == np.float32


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.booleans())
def test_official_sdk_decodes_pass_results(lengths: list[int], wide: bool) -> None:
    outputs = [
        {"logprobs": np.arange(n * (i % 2 + 1 if wide else 1), dtype=np.float32).reshape(n, -1)}
        if wide
        else {"logprobs": np.arange(n, dtype=np.float32)}
        for i, n in enumerate(lengths)
        if n or not wide
    ]
    encoded = proto.encode_forward_backward_output(outputs, {"loss:sum": 1.5})
    theirs = response_conv.deserialize_forward_backward_output(encoded)
    ours = proto.decode_forward_backward_output(encoded)
    assert theirs.metrics == ours.metrics == {"loss:sum": 1.5}
    for expected, one, other in zip(
        outputs, theirs.loss_fn_outputs, ours.loss_fn_outputs, strict=True
    ):
        assert np.array_equal(one["logprobs"].to_numpy(), expected["logprobs"])
        assert np.array_equal(other["logprobs"].to_numpy(), expected["logprobs"])


def test_official_sdk_decodes_samples() -> None:
    top = proto.TopkOutput(np.array([[1, 2]], np.int32), np.array([[-0.5, -1.0]], np.float32))
    encoded = proto.encode_sample_response(
        proto.SampleOutput(
            [
                proto.SequenceOutput(
                    np.array([5], np.int32), np.array([-0.25], np.float32), Stop.STOP, top
                )
            ],
            prompt_logprobs=np.array([np.nan, -1.0], np.float32),
            topk_prompt=top,
            target_prompt_logprobs=np.array([[-2.0]], np.float32),
            prompt_alt=top,
        )
    )
    for response in (
        response_conv.deserialize_sample_response(encoded),
        proto.decode_sample_response(encoded),
    ):
        assert response.sequences[0].stop_reason == "stop"
        assert list(response.sequences[0].tokens) == [5]
        assert response.sequences[0].topk_logprobs == [[(1, -0.5), (2, -1.0)]]
        assert response.prompt_logprobs == [None, -1.0]
        assert response.topk_prompt_logprobs == [[(1, -0.5), (2, -1.0)]]
        assert response.target_prompt_logprobs is not None
        assert response.prompt_alt_tokens is not None
        assert response.target_prompt_logprobs.tolist() == [[-2.0]]
        assert response.prompt_alt_tokens.tokens.tolist() == [[1, 2]]


def zstd_without_a_size(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(content)


COMPRESSED = [
    ("zstd", zstandard.compress),
    ("zstd", zstd_without_a_size),
    ("gzip", gzip.compress),
]


@pytest.mark.parametrize(("encoding", "compress"), COMPRESSED)
def test_decompression_beyond_the_bound_is_rejected(encoding: str, compress: Any) -> None:
    assert decompress(compress(b"x" * 100), encoding, 100) == b"x" * 100
    bomb = compress(b"x" * 10_000_000)
    for limit in (0, 1000, 9_999_999):
        with pytest.raises(BodyTooLarge):
            decompress(bomb, encoding, limit)
    assert head(bomb, encoding, 10) == b"x" * 10


@pytest.mark.parametrize(("encoding", "compress"), COMPRESSED)
def test_damaged_compressed_body_is_rejected(encoding: str, compress: Any) -> None:
    whole = compress(bytes(range(256)) * 10)
    for body in (b"not compressed", whole[:-1], whole[: len(whole) // 2], whole + b"more", b""):
        with pytest.raises(InvalidRequest):
            decompress(body, encoding, 10_000)


def test_decompression_uses_no_more_memory_than_its_bound() -> None:
    bomb = zstd_without_a_size(bytes(200_000_000))
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        decompress(bomb, "zstd", 1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@given(passes)
def test_first_bytes_identify_the_run_and_seq_id(made: proto.TrainingPass) -> None:
    encoded = proto.encode_training_pass(made)
    known = (made.model_id, made.seq_id)
    assert proto.run_and_seq_id_of(encoded) == known
    whole = 2 + len(made.model_id.encode()) + 10
    assert proto.run_and_seq_id_of(encoded[:whole]) == known
    assert proto.run_and_seq_id_of(encoded[: 2 + len(made.model_id.encode())]) is None


@given(st.binary(max_size=200))
def test_other_bytes_identify_no_run(head: bytes) -> None:
    if (known := proto.run_and_seq_id_of(head)) is not None:
        model_id, seq_id = known
        assert head.startswith(b"\x0a" + bytes([len(model_id.encode())]) + model_id.encode())
        assert seq_id


def test_older_json_is_parsed_leniently() -> None:
    request = types.parse(
        types.SampleRequest,
        {
            "prompt": {"chunks": [{"tokens": [1, 2]}]},
            "sampling_params": {"max_tokens": 2, "seed": None},
            "seq_id": 0,
            "sampling_session_id": "s",
            "from_a_newer_sdk": 1,
        },
        newer_client=True,
    )
    assert request.prompt.to_ints() == [1, 2]
    assert request.sampling_params.temperature == 1.0
    step = types.parse(types.OptimStepRequest, {"model_id": "m", "seq_id": 1, "adam_params": {}})
    assert step.adam_params == types.AdamParams()
    with pytest.raises(InvalidRequest, match="model_id"):
        types.parse(types.OptimStepRequest, b"{}")
