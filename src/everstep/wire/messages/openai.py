"""OpenAI requests: completions and chat completions.

The field names and defaults are those of https://platform.openai.com/docs/api-reference. The fields
in `WITHOUT_EFFECT` say nothing about the answer and are ignored. Every other field is honoured, or
rejected by its name unless it has its default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from everstep.wire.base import Request, Response
from everstep.wire.messages.inputs import Seed

Token = Annotated[int, Field(ge=0)]
Prompt = str | list[Token] | list[str] | list[list[Token]]


class CompletionError(Response):
    """An error's text, and its class for clients."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    code: str | None = None


class CompletionErrorResponse(Response):
    """An error in OpenAI's form."""

    error: CompletionError


class _Listed(Request):
    """A message that rejects fields that it does not know, however it is parsed."""

    @model_validator(mode="before")
    @classmethod
    def _has_known_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields.keys()
        for name, value in fields.items():
            if name not in known | WITHOUT_EFFECT and value not in _NOTHING:
                raise ValueError(f"{name} is not supported here; leave it out")
        return {name: fields[name] for name in fields if name in known and fields[name] is not None}


class StreamOptions(_Listed):
    """The parts of a stream besides the text."""

    include_usage: bool = False


class _Completion(_Listed):
    """The fields of both kinds of completions.

    Attributes:
        model: a base model's name, or the ``tinker://`` path of a checkpoint.
        n: the number of completions.
        temperature: 0 takes the likeliest token.
        top_p: draw only from the likeliest tokens that together have this probability.
        top_k: draw only from the k likeliest tokens, an extension that other servers have too.
        seed: the same seed gives the same text.
        stop: strings that end a completion and are not part of it.
        stream: whether to send the text while it is drawn, as server-sent events.
        stream_options: the parts of such a stream.

    The last ones are extensions of other servers. They are declared to be rejected by name.
    """

    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    seed: Seed | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _can_be_honoured(self) -> Self:
        for field in _unsupported(self):
            raise ValueError(f"{field} is not supported here; leave it out")
        return self


class CompletionRequest(_Completion):
    """Continues a text.

    Attributes:
        prompt: one or several prompts, each a text or its tokens.
        max_tokens: the maximum number of new tokens.
        logprobs: the number of likeliest tokens per position, or None for no logprobs.
        echo: whether to put the prompt in front of the text.
    """

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None


class TextPart(_Listed):
    """A part of a message's content."""

    type: Literal["text", "refusal"] = "text"
    text: str = ""
    refusal: str = ""


class ChatMessage(Request):
    """One message of a conversation, which is passed to the model's chat template.

    Attributes:
        role: the speaker.
        content: what is said. The texts of parts are joined.
        name: the speaker's name.
        tool_calls: function calls of the assistant. Their arguments are JSON.
        tool_call_id: the call that a message of the role ``tool`` answers.
        others: further fields, such as ``reasoning_content``. A field that the template does not
            write is rejected.
    """

    role: str
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    tool_call_id: str | None = None
    others: SkipJsonSchema[dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _keep_others(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields.keys() - {"others"}
        said = {name: value for name, value in fields.items() if value is not None}
        others = {name: said.pop(name) for name in list(said) if name not in known}
        return {**said, "others": others}

    def fields(self) -> dict[str, Any]:
        """Return the fields that have a value, for the chat template."""
        own = self.model_dump(exclude={"others"}, exclude_defaults=True)
        if isinstance(self.content, list):
            own["content"] = "".join(part.text + part.refusal for part in self.content)
        return {"role": self.role, "content": "", **own, **self.others}


class ResponseFormat(_Listed):
    """The form of the answer."""

    type: str = "text"


class ChatCompletionRequest(_Completion):
    """Answers a conversation.

    Attributes:
        messages: the conversation so far.
        max_tokens: the older name of ``max_completion_tokens``.
        max_completion_tokens: the maximum number of new tokens, or None for all that fit into the
            context.
        logprobs: whether to return the tokens' logprobs.
        top_logprobs: the number of likeliest tokens per position.
        chat_template_kwargs: arguments of the model's chat template, an extension.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    response_format: ResponseFormat = Field(default_factory=ResponseFormat)
    modalities: list[str] = Field(default_factory=lambda: ["text"])
    tools: list[Any] = Field(default_factory=list)
    functions: list[Any] = Field(default_factory=list)
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def limit(self) -> int | None:
        """The maximum number of new tokens."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


WITHOUT_EFFECT = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "include_obfuscation",
        "cache_control",
        "parallel_tool_calls",
    )
)
"""Fields that say nothing about the answer: about storage, billing, caches and the transport."""

_NOTHING: tuple[Any, ...] = (None, "", [], {})
_NO_TOOLS = (None, "none", "auto")
_EMPTY: tuple[Any, ...] = (None, 0.0, "", [], {}, ["text"], ResponseFormat())
_UNSUPPORTED = (
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "min_p",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "suffix",
    "response_format",
    "modalities",
    "tools",
    "functions",
    "audio",
    "prediction",
    "web_search_options",
    "moderation",
    "reasoning_effort",
    "verbosity",
)


def _unsupported(request: _Completion) -> list[str]:
    """Return the fields of a request that are not supported and have no default value."""
    found = [field for field in _UNSUPPORTED if getattr(request, field, None) not in _EMPTY]
    if request.repetition_penalty != 1.0:
        found.append("repetition_penalty")
    if getattr(request, "best_of", None) not in (None, request.n):
        found.append("best_of other than n")
    if isinstance(request, ChatCompletionRequest):
        found += [
            name
            for name in ("tool_choice", "function_call")
            if getattr(request, name) not in _NO_TOOLS
        ]
        if request.top_logprobs and not request.logprobs:
            found.append("top_logprobs without logprobs")
    if request.stream_options is not None and not request.stream:
        found.append("stream_options without stream")
    return found
