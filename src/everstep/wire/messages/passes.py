"""Training passes: the common form of forward and forward_backward requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from everstep.wire.errors import InvalidRequest
from everstep.wire.messages.inputs import Datum, EncodedTextChunk, ProvenanceSpan
from everstep.wire.messages.requests import (
    ForwardBackwardInput,
    ForwardBackwardRequest,
    ForwardRequest,
)
from everstep.wire.messages.tensors import MAX_DENSE_VALUES

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


READS_PROVENANCE = frozenset({"stable_reinforce"})
"""Losses that read the provenance of tokens. For any other loss it is not decoded."""


@dataclass(frozen=True)
class Provenance:
    """The sampled sequences that a datum's tokens come from.

    Attributes:
        model_input: spans of the input's tokens, in order.
        targets: spans of ``target_tokens``, in order.
    """

    model_input: tuple[ProvenanceSpan, ...]
    targets: tuple[ProvenanceSpan, ...]


@dataclass(frozen=True)
class Example:
    """One datum in the form of the engine.

    Attributes:
        tokens: int64 [T].
        inputs: named float32 or int64 arrays, dense, in their given shape.
        media: the kinds of chunks that are not text, which the engine rejects.
        provenance: where the tokens come from, for a loss that reads it.
    """

    tokens: Array
    inputs: Mapping[str, Array]
    media: tuple[str, ...] = ()
    provenance: Provenance | None = None


@dataclass(frozen=True)
class TrainingPass:
    """A forward or forward_backward request."""

    model_id: str
    seq_id: int
    examples: list[Example] = field(repr=False)
    loss_fn: str
    loss_fn_config: dict[str, float | str]
    forward_only: bool

    @classmethod
    def from_request(cls, request: ForwardBackwardRequest | ForwardRequest) -> TrainingPass:
        """Convert a request from its JSON form.

        Raises:
            InvalidRequest: it has no sequence id, or the parts of a tensor don't fit together.
        """
        if request.seq_id is None:
            raise InvalidRequest("seq_id is required")
        body = pass_input(request)
        try:
            check_filled_out(
                tensor.shape or []
                for datum in body.data
                for tensor in datum.loss_fn_inputs.values()
                if tensor.sparse_crow_indices is not None
            )
            reads = body.loss_fn in READS_PROVENANCE
            examples = [_example(datum, index, reads) for index, datum in enumerate(body.data)]
        except ValueError as error:
            raise InvalidRequest(
                str(error), model_id=request.model_id, seq_id=request.seq_id
            ) from error
        return cls(
            model_id=request.model_id,
            seq_id=request.seq_id,
            examples=examples,
            loss_fn=body.loss_fn,
            loss_fn_config=dict(body.loss_fn_config or {}),
            forward_only=isinstance(request, ForwardRequest),
        )


def pass_input(request: ForwardBackwardRequest | ForwardRequest) -> ForwardBackwardInput:
    """Return the datums and loss of either request."""
    if isinstance(request, ForwardRequest):
        return request.forward_input
    return request.forward_backward_input


def check_filled_out(shapes: Iterable[Sequence[int]]) -> None:
    """Bound the total dense size of a request's sparse tensors.

    Args:
        shapes: [rows, columns] of each. Other shapes are rejected when they become dense.

    Raises:
        ValueError: they have more than `MAX_DENSE_VALUES` values in total.
    """
    total = sum(abs(shape[0] * shape[1]) for shape in shapes if len(shape) == 2)
    if total > MAX_DENSE_VALUES:
        raise ValueError(
            f"the sparse tensors of this request come to {total} values when they are filled out; "
            f"at most {MAX_DENSE_VALUES} are allowed. Send fewer datums."
        )


def _example(datum: Datum, index: int, reads_provenance: bool) -> Example:
    import numpy as np

    tokens: list[int] = []
    media: list[str] = []
    for chunk in datum.model_input.chunks:
        if isinstance(chunk, EncodedTextChunk):
            tokens.extend(chunk.tokens)
        else:
            media.append(chunk.type)
    inputs = {}
    for name in sorted(datum.loss_fn_inputs):
        try:
            inputs[name] = np.atleast_1d(datum.loss_fn_inputs[name].to_numpy())
        except ValueError as error:
            raise ValueError(f"datum {index}, loss_fn_inputs[{name!r}]: {error}") from error
    provenance = None
    if reads_provenance and datum.model_input_spans and datum.loss_fn_input_spans:
        provenance = Provenance(tuple(datum.model_input_spans), tuple(datum.loss_fn_input_spans))
    return Example(np.asarray(tokens, dtype=np.int64), inputs, tuple(media), provenance)
