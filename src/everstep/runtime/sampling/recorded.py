"""Recorded samples: what the service keeps of a sample for the passes that train on it.

A client asks for it with ``record_stability_info``. The prompt is kept as int32, the sequences as
the sample's result without its other parts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from everstep.ledger import Operation, RecordedSample
from everstep.wire.codecs.proto import decode_sample_response, encode_sample_response
from everstep.wire.messages.outputs import SampleOutput, SequenceOutput, Stop

Array = np.ndarray[Any, Any]
_ASKED = b'"record_stability_info":true'
"""Part of a canonical payload. No string in it can hold these bytes: it would escape the quotes."""


@dataclass(frozen=True)
class SampledTokens:
    """A recorded sequence.

    Attributes:
        prompt: the prompt's token ids, int32 [P].
        tokens: the sampled token ids, int32 [T].
        logprobs: their logprobs, float32 [T].
    """

    prompt: Array
    tokens: Array
    logprobs: Array


def to_record(operation: Operation, session_id: str, result: bytes) -> RecordedSample | None:
    """Build the record of a finished sample, or return None if its client did not ask for one.

    Args:
        operation: the sample, with its payload.
        session_id: the session of its sampler.
        result: the sample's result.
    """
    if _ASKED not in operation.payload:
        return None
    chunks = json.loads(operation.payload)["prompt"]["chunks"]
    prompt = np.array([token for chunk in chunks for token in chunk["tokens"]], dtype="<i4")
    sequences = [
        SequenceOutput(
            tokens=np.asarray(each.tokens_np),
            logprobs=np.asarray(each.logprobs_np if each.logprobs_np is not None else []),
            stop_reason=Stop(each.stop_reason),
        )
        for each in decode_sample_response(result).sequences
    ]
    encoded = encode_sample_response(SampleOutput(sequences=sequences))
    return RecordedSample(operation.request_id, session_id, prompt.tobytes(), encoded)


def sampled_tokens(record: RecordedSample) -> list[SampledTokens]:
    """Return the sequences of a record."""
    prompt = np.frombuffer(record.prompt, dtype="<i4")
    empty = np.empty(0, dtype=np.float32)
    return [
        SampledTokens(
            prompt,
            np.asarray(each.tokens_np),
            np.asarray(each.logprobs_np) if each.logprobs_np is not None else empty,
        )
        for each in decode_sample_response(record.sequences).sequences
    ]
