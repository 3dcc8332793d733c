"""Provenance spans in protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everstep.wire.messages.inputs import (
    PromptProvenanceSpan,
    ProvenanceSpan,
    SampledProvenanceSpan,
)
from everstep.wire.messages.passes import Provenance


def add_spans(message: Any, spans: Sequence[ProvenanceSpan]) -> None:
    """Append spans to a repeated field."""
    for span in spans:
        item = message.add()
        sampled = isinstance(span, SampledProvenanceSpan)
        target = item.sampled_tokens if sampled else item.prompt_tokens
        target.sequence_id, target.offset, target.length = (
            span.sequence_id,
            span.offset,
            span.length,
        )


def read_provenance(datum: Any, index: int) -> Provenance | None:
    """Return the provenance of a datum, or None if it has none.

    Args:
        datum: the message.
        index: the datum's position in the request.

    Raises:
        ValueError: a span has no sequence, or a negative offset or length.
    """
    if not (datum.model_input_spans and datum.loss_fn_input_spans):
        return None
    return Provenance(
        _spans(datum.model_input_spans, f"datum {index}, model_input_spans"),
        _spans(datum.loss_fn_input_spans, f"datum {index}, loss_fn_input_spans"),
    )


def _spans(messages: Any, where: str) -> tuple[ProvenanceSpan, ...]:
    spans: list[ProvenanceSpan] = []
    for number, message in enumerate(messages):
        sampled = message.WhichOneof("span") == "sampled_tokens"
        kind = SampledProvenanceSpan if sampled else PromptProvenanceSpan
        span = message.sampled_tokens if sampled else message.prompt_tokens
        fields = {"offset": span.offset, "length": span.length}
        try:
            spans.append(kind(sequence_id=span.sequence_id, **fields))
        except ValueError as error:
            raise ValueError(f"{where}[{number}]: {error}") from error
    return tuple(spans)
