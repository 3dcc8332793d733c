"""Provenance spans: the same from JSON, from protobuf and from the official SDK."""

from __future__ import annotations

from typing import Any

import pytest
import tinker.types
from tinker.proto import request_conv

import everstep.types
from everstep.wire.codecs import everstep_pb2, proto
from everstep.wire.errors import InvalidRequest
from everstep.wire.messages.passes import TrainingPass


def request(types: Any, loss_fn: str = "stable_reinforce") -> Any:
    """A datum of a prompt of two tokens and three sampled ones."""
    datum = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={"target_tokens": [0, 3, 4, 5], "advantages": [0.0, 1.0, 1.0, 1.0]},
    ).with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id="a:0", length=2),
            types.SampledProvenanceSpan(sequence_id="a:0", length=2),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id="a:0", offset=1, length=1),
            types.SampledProvenanceSpan(sequence_id="a:0", length=2),
            types.SampledProvenanceSpan(sequence_id="b:7", offset=4, length=1),
        ],
    )
    body = types.ForwardBackwardInput(data=[datum], loss_fn=loss_fn)
    return types.ForwardBackwardRequest(forward_backward_input=body, model_id="m", seq_id=7)


def spans(training_pass: TrainingPass) -> list[list[tuple[str, str, int, int]]]:
    provenance = training_pass.examples[0].provenance
    assert provenance is not None
    return [
        [(type(span).__name__[:7], span.sequence_id, span.offset, span.length) for span in field]
        for field in (provenance.model_input, provenance.targets)
    ]


FIELD = "loss_fn_input_spans"
EXPECTED = [
    [("PromptP", "a:0", 0, 2), ("Sampled", "a:0", 0, 2)],
    [("PromptP", "a:0", 1, 1), ("Sampled", "a:0", 0, 2), ("Sampled", "b:7", 4, 1)],
]


def test_spans_are_read_from_every_client() -> None:
    ours = request(everstep.types)
    official = request_conv.forward_backward_request_to_proto(request(tinker.types))
    assert proto.encode_forward_backward_request(ours) == official.SerializeToString()
    from_official = proto.decode_training_pass(official.SerializeToString())
    text = ours.model_dump_json()
    assert '"sampled_tokens":{"sequence_id":"b:7","offset":4,"length":1}' in text
    again = everstep.types.ForwardBackwardRequest.model_validate_json(text)
    from_json = TrainingPass.from_request(again)
    assert spans(from_official) == spans(from_json) == EXPECTED
    stored = proto.encode_training_pass(from_official)
    assert stored == proto.encode_training_pass(from_json)
    assert spans(proto.decode_training_pass(stored)) == EXPECTED


def test_spans_are_kept_only_for_a_loss_that_reads_them() -> None:
    sent = request_conv.forward_backward_request_to_proto(request(tinker.types, "ppo"))
    read = proto.decode_training_pass(sent.SerializeToString())
    assert read.examples[0].provenance is None
    assert b"a:0" not in proto.encode_training_pass(read)
    assert TrainingPass.from_request(request(everstep.types, "ppo")).examples[0] is not None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sequence_id": "", "length": 1}, "sequence_id must not be empty"),
        ({"sequence_id": "a", "length": -1}, "must be 0 or greater"),
        ({"sequence_id": "a", "offset": -3, "length": 1}, "got -3, 1"),
    ],
)
def test_impossible_span_is_named(fields: dict[str, Any], text: str) -> None:
    message = everstep_pb2.ForwardBackwardRequest(
        model_id="m", seq_id=7, loss_fn="stable_reinforce"
    )
    datum = message.data.add()
    datum.model_input_spans.add().prompt_tokens.sequence_id = "a"
    span = datum.loss_fn_input_spans.add().sampled_tokens
    for name, value in fields.items():
        setattr(span, name, value)
    with pytest.raises(InvalidRequest, match="datum 0, loss_fn_input_spans") as caught:
        proto.decode_training_pass(message.SerializeToString())
    assert text in str(caught.value)
    assert (caught.value.model_id, caught.value.seq_id) == ("m", 7)


def test_null_in_json_is_an_absent_kind() -> None:
    good = request(everstep.types).forward_backward_input.data[0].model_dump(mode="json")
    nulls = [{"prompt_tokens": None, "sampled_tokens": None, **each} for each in good[FIELD]]
    read = everstep.types.Datum.model_validate({**good, FIELD: nulls})
    assert read == everstep.types.Datum.model_validate(good)


@pytest.mark.parametrize(
    "span",
    [
        {"sequence_id": "a", "length": 1},
        {},
        {"prompt_tokens": {"sequence_id": "a", "length": 1}, "sampled_tokens": {}},
        {"sampled_tokens": {"sequence_id": "", "length": 1}},
        {"sampled_tokens": {"sequence_id": "a"}},
        {"sampled_tokens": {"sequence_id": "a", "length": 2**63}},
    ],
)
def test_ambiguous_span_in_json_is_rejected(span: dict[str, Any]) -> None:
    good = request(everstep.types).forward_backward_input.data[0].model_dump(mode="json")
    everstep.types.Datum.model_validate(good)
    with pytest.raises(ValueError, match=r"span|sequence_id|length"):
        everstep.types.Datum.model_validate({**good, "loss_fn_input_spans": [span]})
