"""Messages survive their encoding, each kind of them."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields

import pytest

from everstep.engine.models.info import ModelInfo
from everstep.vault import CheckpointId
from everstep.wire.messages.streams import DrawnToken, DrawnTokens
from everstep.worker.protocol import codec, messages
from everstep.worker.protocol.messages import Message

INFO = ModelInfo("m", "path", "Arch", 256, 128, "f00d", (1, 2), "path", "cpu", "float32")
SOURCE = CheckpointId("training", "r", "n")
EXAMPLES: list[Message] = [
    messages.Ready([INFO], {"torch": "2.8"}),
    messages.Unusable("model 'm' can't be loaded"),
    messages.Captured(),
    messages.Drawn(
        [
            DrawnTokens(
                position=3, tokens=[DrawnToken(sequence=0, position=3, token=7, logprob=-0.5)]
            )
        ]
    ),
    messages.Failed("no room", "server", True),
    messages.RunCreated(12, seconds=0.25),
    messages.RunRestored(12, 3, ["tinker://r/weights/a"]),
    messages.CheckpointLoaded(3, []),
    messages.PassDone(b"\x00\x01", seconds=0.1),
    messages.OptimStepDone({"grad_norm": 0.1 + 0.2, "step": 3}),
    messages.RunSaved(100, 3),
    messages.RunDropped(),
    messages.SampleDone(b"\xff"),
    messages.Encoded([1, 2, 3]),
    messages.AdapterImported(100, 3, {"rank": 4}),
    messages.CreateRun("r", "m", {"rank": 4}),
    messages.RestoreRun("r", "m", {"rank": 4}, SOURCE, True),
    messages.LoadCheckpoint("r", SOURCE, False),
    messages.TrainingPass("r", b"\x00\x01"),
    messages.OptimStep("r", {"learning_rate": 1}, may_diverge=True),
    messages.DropRun("r"),
    messages.SaveRun("r", {"kind": "training"}, [[None, "tinker://r/weights/a"]], ["age1"]),  # type: ignore[list-item]
    messages.Sample("m", None, "s", 1 << 60, b"{}"),
    messages.Sample("m", SOURCE, "s", 0, b"{}"),
    messages.Watch(5),
    messages.Cancel(),
    messages.Encode("m", {"text": "Grüße"}),
    messages.ImportAdapter("m", "/tmp/x", 3, 0, None, {"kind": "training"}),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=codec.kind_of)
def test_message_is_decoded_as_it_was_encoded(message: Message) -> None:
    header, body = codec.encode(message)
    assert codec.decode(json.loads(json.dumps(header)), body) == message


def test_every_message_has_an_example() -> None:
    bases = (messages.Reply, messages.Command, messages.RunCommand, Message)
    kinds = {
        each
        for _, each in inspect.getmembers(messages, inspect.isclass)
        if issubclass(each, Message) and each not in bases
    }
    assert kinds
    assert kinds == {type(example) for example in EXAMPLES}


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e-320, -0.0, 5, 0.1 + 0.2])
def test_metrics_keep_their_bits_and_their_type(value: float) -> None:
    header, body = codec.encode(messages.OptimStepDone({"value": value}))
    decoded = codec.decode(json.loads(json.dumps(header)), body)
    assert isinstance(decoded, messages.OptimStepDone)
    assert repr(decoded.metrics["value"]) == repr(value)


def test_body_stays_out_of_the_text_of_a_message() -> None:
    bodies = [each for each in EXAMPLES if any(f.name == "body" for f in fields(each))]  # type: ignore[arg-type]
    assert len(bodies) == 5
    for message in bodies:
        assert "body" not in repr(message)
