"""Answers in OpenAI's forms: whole, or as chunks of a stream.

https://platform.openai.com/docs/api-reference/completions/object and …/chat/object.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from everstep.server.openai.text import Scored
from everstep.wire.openai import CompletionError, CompletionErrorResponse


class Form(Protocol):
    """How one kind of completion is written down."""

    def whole(self, text: str, scores: Sequence[Scored] | None, reason: str) -> dict[str, Any]:
        """The members of a finished choice."""

    def opening(self) -> dict[str, Any] | None:
        """The members of a choice that a stream begins with; None: it begins with text."""

    def piece(self, text: str, scores: Sequence[Scored] | None) -> dict[str, Any]:
        """The members of a choice of which a part of the text is sent."""

    def last(self) -> dict[str, Any]:
        """The members of a choice that a stream ends with."""

    def head(self, *, stream: bool) -> dict[str, Any]:
        """What is the same in every answer to one request."""


class _Head:
    """An answer's id, time and model."""

    _prefix: str
    _objects: tuple[str, str]

    def __init__(self, request_id: str, model: str) -> None:
        self._same = {
            "id": f"{self._prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def head(self, *, stream: bool) -> dict[str, Any]:
        """What is the same in every answer to one request."""
        return {**self._same, "object": self._objects[1 if stream else 0]}


class TextForm(_Head):
    """A completion: plain text."""

    _prefix = "cmpl"
    _objects = ("text_completion", "text_completion")

    def whole(self, text: str, scores: Sequence[Scored] | None, reason: str) -> dict[str, Any]:
        """The members of a finished choice."""
        return {**self.piece(text, scores), "finish_reason": reason}

    def opening(self) -> dict[str, Any] | None:
        """A stream begins with text."""
        return None

    def piece(self, text: str, scores: Sequence[Scored] | None) -> dict[str, Any]:
        """The members of a choice of which a part of the text is sent."""
        return {"text": text, "logprobs": None if scores is None else _text_logprobs(scores)}

    def last(self) -> dict[str, Any]:
        """The members of a choice that a stream ends with."""
        return self.piece("", None)


class ChatForm(_Head):
    """A chat completion: a message of the assistant."""

    _prefix = "chatcmpl"
    _objects = ("chat.completion", "chat.completion.chunk")

    def whole(self, text: str, scores: Sequence[Scored] | None, reason: str) -> dict[str, Any]:
        """The members of a finished choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": _chat_logprobs(scores), "finish_reason": reason}

    def opening(self) -> dict[str, Any] | None:
        """A stream begins with who speaks."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, text: str, scores: Sequence[Scored] | None) -> dict[str, Any]:
        """The members of a choice of which a part of the text is sent."""
        return {"delta": {"content": text}, "logprobs": _chat_logprobs(scores)}

    def last(self) -> dict[str, Any]:
        """The members of a choice that a stream ends with."""
        return {"delta": {}, "logprobs": None}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """How many tokens there were."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error, as OpenAI's clients read it."""
    error = CompletionError(
        message=message,
        type="invalid_request_error" if status < 500 else "server_error",
        code={404: "model_not_found", 429: "rate_limit_exceeded"}.get(status),
    )
    return CompletionErrorResponse(error=error).model_dump(mode="json")


def _text_logprobs(scores: Sequence[Scored]) -> dict[str, Any]:
    return {
        "tokens": [each.text for each in scores],
        "token_logprobs": [each.logprob for each in scores],
        "top_logprobs": [_with_chosen(each) for each in scores],
        "text_offset": [each.offset for each in scores],
    }


def _with_chosen(score: Scored) -> dict[str, float] | None:
    """The likeliest tokens, and the one that stands there."""
    return None if score.logprob is None else {**dict(score.top), score.text: score.logprob}


def _chat_logprobs(scores: Sequence[Scored] | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    content = [
        {
            **_token(each.text, each.logprob),
            "top_logprobs": [_token(text, value) for text, value in each.top],
        }
        for each in scores
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    # A part of a character has no text of its own; what its bytes are is not known here.
    known = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}
