"""Model inputs: chunks, inputs, datums, and the provenance of their tokens."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from everstep.wire import whole_lists
from everstep.wire.base import Request
from everstep.wire.fields import fields_of
from everstep.wire.messages.tensors import TensorData, TensorDtype

TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
"""A token id, which is an int32 in protobuf."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A seed of 64 bits with a sign, as in OpenAI's API. An adapter's has to be 0 or more."""


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


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

    @field_validator("tokens", mode="wrap")
    @classmethod
    def _read_tokens(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Read an array or a tensor as a list, and a whole list of token ids at once."""
        value = value if isinstance(value, list | tuple) else _listed(value)
        if type(value) is not list or (tokens := whole_lists.token_ids(value)) is None:
            return validate(value)
        return tokens

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.tokens)


class ImageChunk(Request):
    """An image, whose ``data`` is base64 in JSON."""

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
        """Number of tokens, raising ValueError when ``expected_tokens`` is not set."""
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
        """Number of tokens, raising ValueError when ``expected_tokens`` is not set."""
        if self.expected_tokens is None:
            raise ValueError("set expected_tokens to use an image's length")
        return self.expected_tokens


class DmelChunk(Request):
    """Audio: a serialized tensor of its tokens, which is base64 in JSON."""

    dmel: bytes
    type: Literal["dmel"] = "dmel"

    _decode = field_validator("dmel", mode="before")(_from_base64)

    @field_serializer("dmel")
    def _encode(self, value: bytes) -> str:
        return base64.b64encode(value).decode()

    @property
    def length(self) -> int:
        """Raises ValueError, because only the service knows the serialized form."""
        raise ValueError("the length of an audio chunk is not known here")


def _chunk_type(value: Any) -> str:
    """Return a chunk's type, inferred from its fields where an older SDK omits ``type``."""
    names = ("type", "location", "data", "dmel")
    fields = value if isinstance(value, Mapping) else fields_of(value, names)
    if not isinstance(fields, Mapping):
        return "encoded_text"
    if fields.get("type"):
        return str(fields["type"])
    for field, name in (("location", "image_asset_pointer"), ("data", "image"), ("dmel", "dmel")):
        if field in fields:
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
        """Return an input of text tokens: a list, an array or a tensor of them."""
        values = tokens if type(tokens) is list else list(_listed(tokens))
        if (checked := whole_lists.token_ids(values)) is None:
            return cls(chunks=[EncodedTextChunk(tokens=values)])
        return cls.model_construct(chunks=[EncodedTextChunk.model_construct(tokens=checked)])

    @classmethod
    def empty(cls) -> ModelInput:
        """Return an input without chunks."""
        return cls(chunks=[])

    def to_ints(self) -> list[int]:
        """Return all token ids, or raise ValueError if a chunk is not text."""
        tokens: list[int] = []
        for chunk in self.chunks:
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(f"a chunk of type {chunk.type} has no token ids")
            tokens.extend(chunk.tokens)
        return tokens

    @property
    def length(self) -> int:
        """Number of tokens. Raises ValueError if that of a chunk is unknown."""
        return sum(chunk.length for chunk in self.chunks)

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """Return a new input with one more chunk."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """Return a new input with one more token."""
        return self.append(EncodedTextChunk(tokens=[token]))


_MAX_POSITION = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class _Span:
    sequence_id: str
    offset: int = 0
    length: int

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not self.sequence_id:
            raise ValueError(f"{kind}.sequence_id must not be empty")
        if self.offset < 0 or self.length < 0:
            raise ValueError(
                f"{kind}.offset and .length must be 0 or greater; got {self.offset}, {self.length}"
            )
        if max(self.offset, self.length) > _MAX_POSITION:
            raise ValueError(f"{kind}.offset and .length must be at most {_MAX_POSITION}")


@dataclass(frozen=True, kw_only=True)
class PromptProvenanceSpan(_Span):
    """Tokens of a sampled sequence's prompt.

    Attributes:
        sequence_id: a sequence that was sampled from that prompt.
        offset: the index of the first token in the prompt.
        length: the number of tokens.
    """


@dataclass(frozen=True, kw_only=True)
class SampledProvenanceSpan(_Span):
    """Sampled tokens.

    Attributes:
        sequence_id: the sequence.
        offset: the index of the first token among the sequence's sampled tokens.
        length: the number of tokens.
    """


ProvenanceSpan = PromptProvenanceSpan | SampledProvenanceSpan
ProvenanceSpans = list[ProvenanceSpan]
_SPANS = {"prompt_tokens": PromptProvenanceSpan, "sampled_tokens": SampledProvenanceSpan}


class _NamedByKind:
    """Describes spans in JSON Schema as `_span_of` reads them."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        described = handler(schema)
        kinds = zip(_SPANS, described["items"]["anyOf"], strict=True)
        described["items"] = {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {name: kind},
                    "required": [name],
                    "additionalProperties": False,
                }
                for name, kind in kinds
            ]
        }
        return described


def _span_of(value: Any) -> Any:
    """Convert a span from JSON: ``{"sampled_tokens": {"sequence_id": …}}``, as in protobuf."""
    if not isinstance(value, dict):
        return _foreign_span(value)
    given = [name for name, content in value.items() if content is not None]
    kinds = value.keys() & _SPANS.keys() & set(given)
    if len(given) != 1 or not kinds:
        raise ValueError(
            "a span is {'prompt_tokens': {…}} or {'sampled_tokens': {…}} with sequence_id, offset "
            f"and length; got {', '.join(map(str, value)) or 'nothing'}"
        )
    (kind,) = kinds
    return TypeAdapter(_SPANS[kind]).validate_python(value[kind])


def check_tiling(field: str, spans: Sequence[ProvenanceSpan], length: int) -> None:
    """Raise ValueError unless the spans cover a field of this length, each position once."""
    total = sum(span.length for span in spans)
    if total != length:
        raise ValueError(
            f"the spans of {field} cover {total} positions, but there are {length}; they have to "
            "cover each once, in order"
        )


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
    """One training example: an input, and the loss's inputs for each of its positions."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = Field(default_factory=dict)
    model_input_spans: Annotated[ProvenanceSpans, _NamedByKind] | None = None
    loss_fn_input_spans: Annotated[ProvenanceSpans, _NamedByKind] | None = None

    @field_validator("model_input_spans", "loss_fn_input_spans", mode="before")
    @classmethod
    def _read_spans(cls, value: Any) -> Any:
        return [_span_of(span) for span in value] if isinstance(value, list) else value

    @field_serializer("model_input_spans", "loss_fn_input_spans", when_used="unless-none")
    def _write_spans(self, spans: ProvenanceSpans) -> list[dict[str, Any]]:
        names = {kind: name for name, kind in _SPANS.items()}
        return [{names[type(span)]: vars(span)} for span in spans]

    @model_validator(mode="before")
    @classmethod
    def _convert(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        fields = fields_of(value, cls.model_fields)
        if not isinstance(fields, Mapping):
            return fields
        fields = dict(fields)
        if isinstance(inputs := fields.get("loss_fn_inputs"), Mapping):
            fields["loss_fn_inputs"] = {key: _tensor_of(key, v) for key, v in inputs.items()}
        return fields

    @model_validator(mode="after")
    def _check_spans(self) -> Datum:
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise ValueError("give model_input_spans and loss_fn_input_spans together")
        return self

    def with_provenance(
        self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans
    ) -> Datum:
        """Return a copy with the provenance of its tokens.

        Args:
            model_input: spans that cover the input's tokens, in order.
            loss_fn_inputs: spans that cover ``target_tokens`` [T], in order.

        Raises:
            ValueError: the spans don't cover each position once.
        """
        check_tiling("model_input", model_input, self.model_input.length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and targets.shape is not None and len(targets.shape) == 1:
            check_tiling("loss_fn_inputs", loss_fn_inputs, targets.shape[0])
        update = {"model_input_spans": model_input, "loss_fn_input_spans": loss_fn_inputs}
        return self.model_copy(update=update)


def _tensor_of(key: str, value: Any) -> Any:
    """Convert lists, arrays and torch tensors to tensors. The name implies a list's dtype."""
    package = type(value).__module__.partition(".")[0]
    if not isinstance(value, list | tuple) and package not in ("torch", "numpy"):
        return value
    try:
        if package == "torch":
            sparse = key in ("target_tokens", "weights")
            return TensorData.from_torch_sparse(value) if sparse else TensorData.from_torch(value)
        if package == "numpy":
            return TensorData.from_numpy(value)
        if key not in _LIST_DTYPES:
            raise ValueError("give a TensorData; a list has no dtype")
        tensor = TensorData(value, _LIST_DTYPES[key])
        tensor.shape = list(tensor.to_numpy().shape)
        return tensor
    except ValueError as error:
        raise ValueError(f"loss_fn_inputs[{key!r}]: {error}") from error


def _foreign_span(value: Any) -> Any:
    """Convert a span of another package. The two kinds have the same fields and differ in name."""
    if isinstance(value, PromptProvenanceSpan | SampledProvenanceSpan):
        return value
    kind = _SPAN_KINDS.get(type(value).__name__)
    fields = fields_of(value, ("sequence_id", "offset", "length"))
    if kind is None or not isinstance(fields, Mapping):
        raise ValueError(
            f"a span has to be a {' or a '.join(_SPAN_KINDS)}; got {type(value).__name__}"
        )
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"a span can't be read: {error}") from error


_SPAN_KINDS = {kind.__name__: kind for kind in (PromptProvenanceSpan, SampledProvenanceSpan)}
