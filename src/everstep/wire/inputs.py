"""What a model is given: chunks, inputs, datums."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_serializer, field_validator, model_validator

from everstep.wire.base import Request
from everstep.wire.tensors import TensorData, TensorDtype


class EncodedTextChunk(Request):
    """Text as token ids."""

    tokens: Sequence[int]
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

    @field_validator("data", mode="before")
    @classmethod
    def _decode(cls, value: bytes | str) -> bytes:
        return base64.b64decode(value) if isinstance(value, str) else value

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
    """Audio."""

    dmel: Any
    type: Literal["dmel"] = "dmel"


def _chunk_type(value: Any) -> str:
    """A chunk's type, told by its fields where an older SDK leaves ``type`` out."""
    if not isinstance(value, dict):
        return str(getattr(value, "type", "encoded_text"))
    if value.get("type"):
        return str(value["type"])
    for field, name in (("tokens", "encoded_text"), ("location", "image_asset_pointer")):
        if field in value:
            return name
    return "image" if "data" in value else "encoded_text"


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
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks if not isinstance(chunk, DmelChunk))

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
    loss_fn_inputs: dict[str, TensorData]

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("loss_fn_inputs"), dict):
            converted = {k: _tensor_of(k, v) for k, v in value["loss_fn_inputs"].items()}
            return {**value, "loss_fn_inputs": converted}
        return value


def _tensor_of(key: str, value: Any) -> Any:
    """Lists, arrays and torch tensors become tensors; the name gives a list's dtype."""
    if isinstance(value, list):
        if key not in _LIST_DTYPES:
            raise ValueError(f"loss_fn_inputs[{key!r}]: give a TensorData, a list has no dtype")
        return TensorData(value, _LIST_DTYPES[key], _shape(value))
    if type(value).__module__.split(".")[0] == "torch":
        sparse = key in ("target_tokens", "weights")
        return TensorData.from_torch_sparse(value) if sparse else TensorData.from_torch(value)
    if type(value).__module__.split(".")[0] == "numpy":
        return TensorData.from_numpy(value)
    return value


def _shape(values: Any) -> list[int]:
    import numpy as np

    return list(np.shape(values))
