"""Training passes: one form of a forward or forward_backward request, however it travelled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from everstep.wire.errors import InvalidRequest
from everstep.wire.inputs import Datum, EncodedTextChunk
from everstep.wire.requests import ForwardBackwardInput, ForwardBackwardRequest, ForwardRequest
from everstep.wire.tensors import MAX_DENSE_VALUES

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Example:
    """One datum as the engine takes it.

    Attributes:
        tokens: int64 [T].
        inputs: named float32 or int64 arrays, dense, in the shape they were given.
        media: kinds of the chunks that are not text; the engine refuses them.
    """

    tokens: Array
    inputs: Mapping[str, Array]
    media: tuple[str, ...] = ()


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
        """From the JSON form.

        Raises:
            InvalidRequest: no sequence id, or a tensor whose parts don't fit one another.
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
            examples = [_example(datum, index) for index, datum in enumerate(body.data)]
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
    """The datums and loss of either form."""
    if isinstance(request, ForwardRequest):
        return request.forward_input
    return request.forward_backward_input


def check_filled_out(shapes: Iterable[Sequence[int]]) -> None:
    """Bound what a request's sparse tensors come to together.

    Args:
        shapes: [rows, columns] of each; others are refused when they are filled out.

    Raises:
        ValueError: they come to more than `MAX_DENSE_VALUES`.
    """
    total = sum(abs(shape[0] * shape[1]) for shape in shapes if len(shape) == 2)
    if total > MAX_DENSE_VALUES:
        raise ValueError(
            f"the sparse tensors of this request come to {total} values when they are filled out; "
            f"at most {MAX_DENSE_VALUES} are allowed. Send fewer datums."
        )


def _example(datum: Datum, index: int) -> Example:
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
    return Example(np.asarray(tokens, dtype=np.int64), inputs, tuple(media))
