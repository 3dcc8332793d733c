"""What a model is given: chunks, inputs, datums."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_serializer, field_validator, model_validator

from everstep.wire.base import Request
from everstep.wire.provenance import ProvenanceSpans, check_tiling
from everstep.wire.tensors import TensorData, TensorDtype

TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
"""A token id travels as int32."""


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error


class EncodedTextChunk(Request):
    """Text as token ids."""

    tokens: Sequence[TokenId]
    type: Literal["encoded_text"] = "encoded_text"

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


class ImageChunk(Request):
    """An image; ``data`` is base64 in JSON."""

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    _decode = field_validator("data", mode="before")(_from_base64)

    @field_serializer("data")
    def _encode(self, value: bytes) -> str:
        return base64.b64encode(value).decode()

    @property
    def length(self) -> int:
        """Number of tokens; raises ValueError when ``expected_tokens`` is not set."""
        if self.expected_tokens is None:
            raise ValueError("set expected_tokens to use an image's length")
        return self.expected_tokens


class ImageAssetPointerChunk(Request):
    """A reference to an image."""

    location: str
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def length(self) -> int:
        """Number of tokens; raises ValueError when ``expected_tokens`` is not set."""
        if self.expected_tokens is None:
            raise ValueError("set expected_tokens to use an image's length")
        return self.expected_tokens


class DmelChunk(Request):
    """Audio: a serialized tensor of its tokens; ``dmel`` is base64 in JSON."""

    dmel: bytes
    type: Literal["dmel"] = "dmel"

    _decode = field_validator("dmel", mode="before")(_from_base64)

    @field_serializer("dmel")
    def _encode(self, value: bytes) -> str:
        return base64.b64encode(value).decode()

    @property
    def length(self) -> int:
        """Raises ValueError: the serialized form is the service's own."""
        raise ValueError("the length of an audio chunk is not known here")


def _chunk_type(value: Any) -> str:
    """A chunk's type, told by its fields where an older SDK leaves ``type`` out."""
    if not isinstance(value, dict):
        return str(getattr(value, "type", "encoded_text"))
    if value.get("type"):
        return str(value["type"])
    for field, name in (("location", "image_asset_pointer"), ("data", "image"), ("dmel", "dmel")):
        if field in value:
            return name
    return "encoded_text"


ModelInputChunk = Annotated[
    Annotated[EncodedTextChunk, Tag("encoded_text")]
    | Annotated[ImageChunk, Tag("image")]
    | Annotated[ImageAssetPointerChunk, Tag("image_asset_pointer")]
    | Annotated[DmelChunk, Tag("dmel")],
    Discriminator(_chunk_type),
]


class ModelInput(Request):
    """A sequence of chunks."""

    chunks: list[ModelInputChunk] = Field(default_factory=list)

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """An input of text tokens."""
        return cls(chunks=[EncodedTextChunk(tokens=list(tokens))])

    @classmethod
    def empty(cls) -> ModelInput:
        """An input without chunks."""
        return cls(chunks=[])

    def to_ints(self) -> list[int]:
        """All token ids; raises ValueError where a chunk is not text."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(f"a chunk of type {chunk.type} has no token ids")
            tokens.extend(chunk.tokens)
        return tokens

    @property
    def length(self) -> int:
        """Number of tokens; raises ValueError where a chunk's is not known."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """A new input with one more chunk."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token."""
        return self.append(EncodedTextChunk(tokens=[token]))


_LIST_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}


class Datum(Request):
    """One training example: an input, and what the loss takes for each of its positions."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = Field(default_factory=dict)
    model_input_spans: ProvenanceSpans | None = None
    loss_fn_input_spans: ProvenanceSpans | None = None

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("loss_fn_inputs"), dict):
            inputs = value["loss_fn_inputs"].items()
            return {**value, "loss_fn_inputs": {key: _tensor_of(key, v) for key, v in inputs}}
        return value

    @model_validator(mode="after")
    def _check_spans(self) -> Datum:
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise ValueError("give model_input_spans and loss_fn_input_spans together")
        return self

    def with_provenance(
        self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans
    ) -> Datum:
        """A copy that says where its tokens come from.

        Args:
            model_input: spans that cover the input's tokens, in order.
            loss_fn_inputs: spans that cover ``target_tokens`` [T], in order.

        Raises:
            ValueError: they don't cover each position once.
        """
        check_tiling("model_input", model_input, self.model_input.length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and targets.shape is not None and len(targets.shape) == 1:
            check_tiling("loss_fn_inputs", loss_fn_inputs, targets.shape[0])
        update = {"model_input_spans": model_input, "loss_fn_input_spans": loss_fn_inputs}
        return self.model_copy(update=update)


def _tensor_of(key: str, value: Any) -> Any:
    """Lists, arrays and torch tensors become tensors; the name gives a list's dtype."""
    package = type(value).__module__.partition(".")[0]
    if not isinstance(value, list) and package not in ("torch", "numpy"):
        return value
    try:
        if package == "torch":
            sparse = key in ("target_tokens", "weights")
            return TensorData.from_torch_sparse(value) if sparse else TensorData.from_torch(value)
        if package == "numpy":
            return TensorData.from_numpy(value)
        if key not in _LIST_DTYPES:
            raise ValueError("give a TensorData; a list has no dtype")
        return TensorData(value, _LIST_DTYPES[key], _shape(value))
    except ValueError as error:
        raise ValueError(f"loss_fn_inputs[{key!r}]: {error}") from error


def _shape(values: list[Any]) -> list[int]:
    import numpy as np

    return list(np.shape(values))
