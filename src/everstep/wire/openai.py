"""Requests of OpenAI's protocol: completions and chat completions, as its clients send them.

The field names and defaults are those of https://platform.openai.com/docs/api-reference. Fields
that change nothing here (``user``, ``metadata``, ``store``, …) are ignored. Fields that would
change what comes back, and can't be honoured, are refused when they ask for something.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from everstep.wire.base import Request, Response

Token = Annotated[int, Field(ge=0)]
Prompt = str | list[Token] | list[str] | list[list[Token]]


class CompletionError(Response):
    """What was wrong, and how clients class it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = None
    code: str | None = None


class CompletionErrorResponse(Response):
    """An error, in the form that OpenAI's clients read."""

    error: CompletionError


class StreamOptions(Request):
    """What a stream holds beside the text."""

    include_usage: bool = False


class _Completion(Request):
    """What both kinds of completions have.

    Attributes:
        model: a base model's name, or the ``tinker://`` path of a checkpoint.
        n: how many completions.
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only the k likeliest tokens; an extension, as other servers have it.
        seed: the same seed gives the same text.
        stop: texts that end a completion; they do not belong to it.
        stream: whether the text is sent as it is drawn, as server-sent events.
        stream_options: what such a stream holds.

    The last ones are extensions of other servers, here so that they are refused by name.
    """

    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    seed: int | None = None
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
        """The texts that end a completion."""
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
    """A text is to be continued.

    Attributes:
        prompt: one or several, each a text or its tokens.
        max_tokens: most new tokens.
        logprobs: how many likeliest tokens at each place; None: no logprobs.
        echo: whether the prompt is in front of the text.
    """

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None


class TextPart(Request):
    """A part of a message's content."""

    type: Literal["text", "refusal"] = "text"
    text: str = ""
    refusal: str = ""


class ChatMessage(Request):
    """One message of a conversation; fields that a model's template knows are passed to it."""

    role: str
    content: str | list[TextPart] = ""
    name: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or part.refusal for part in self.content)


class ResponseFormat(Request):
    """What form the answer has."""

    type: str = "text"


class ChatCompletionRequest(_Completion):
    """A conversation is to be answered.

    Attributes:
        messages: the conversation so far.
        max_tokens: most new tokens; None: up to the context's end. Its older name.
        max_completion_tokens: the same.
        logprobs: whether the tokens' logprobs are wanted.
        top_logprobs: how many likeliest tokens at each place.
        chat_template_kwargs: passed to the model's chat template; an extension.
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

    @property
    def limit(self) -> int | None:
        """Most new tokens."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


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
)


def _unsupported(request: _Completion) -> list[str]:
    """The fields of a request that ask for what can't be had."""
    found = [field for field in _UNSUPPORTED if getattr(request, field, None) not in _EMPTY]
    if request.repetition_penalty != 1.0:
        found.append("repetition_penalty")
    if getattr(request, "best_of", None) not in (None, request.n):
        found.append("best_of other than n")
    return found
