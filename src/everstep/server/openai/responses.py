"""OpenAI responses: the forms of completions and chat completions, whole or in chunks.

https://platform.openai.com/docs/api-reference/completions/object and …/chat/object.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

from everstep.server.openai.detokenize import REPLACEMENT, Scored

_IMPOSSIBLE = -9999.0
"""The logprob of a token of probability zero."""


class Form(Protocol):
    """The form of one kind of completion."""

    def whole(self, text: str, scores: Sequence[Scored] | None, reason: str) -> dict[str, Any]:
        """The members of a finished choice."""

    def opening(self) -> dict[str, Any] | None:
        """The members of a choice that a stream begins with; None if it begins with text."""

    def piece(self, text: str, scores: Sequence[Scored] | None) -> dict[str, Any]:
        """The members of a choice of which a part of the text is sent."""

    def last(self) -> dict[str, Any]:
        """The members of a choice that a stream ends with."""

    def head(self, *, stream: bool) -> dict[str, Any]:
        """The members that every answer to one request has."""


class _Head:
    """The id, time and model of an answer."""

    _prefix: str
    _objects: tuple[str, str]

    def __init__(self, request_id: str, model: str) -> None:
        self._same = {
            "id": f"{self._prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def head(self, *, stream: bool) -> dict[str, Any]:
        """Return the members that every answer to one request has."""
        return {**self._same, "object": self._objects[1 if stream else 0]}


class TextForm(_Head):
    """A completion: plain text."""

    _prefix = "cmpl"
    _objects = ("text_completion", "text_completion")

    def whole(self, text: str, scores: Sequence[Scored] | None, reason: str) -> dict[str, Any]:
        """The members of a finished choice."""
        return {**self.piece(text, scores), "finish_reason": reason}

    def opening(self) -> dict[str, Any] | None:
        """Return None, because a stream begins with text."""
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
        """Return the role of the speaker, with which a stream begins."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, text: str, scores: Sequence[Scored] | None) -> dict[str, Any]:
        """The members of a choice of which a part of the text is sent."""
        return {"delta": {"content": text}, "logprobs": _chat_logprobs(scores)}

    def last(self) -> dict[str, Any]:
        """The members of a choice that a stream ends with."""
        return {"delta": {}, "logprobs": None}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the numbers of tokens in OpenAI's form."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _text_logprobs(scores: Sequence[Scored]) -> dict[str, Any]:
    return {
        "tokens": [each.text for each in scores],
        "token_logprobs": [_finite(each.logprob) for each in scores],
        "top_logprobs": [_top_logprobs(each) for each in scores],
        "text_offset": [each.offset for each in scores],
    }


def _top_logprobs(score: Scored) -> dict[str, float | None] | None:
    """Return the logprobs of the likeliest tokens and of the chosen one, by their texts.

    A token whose text another one has is named by its id, as other servers do: a harness that takes
    the maximum must find the likeliest token's.
    """
    if score.logprob is None:
        return None
    found = {score.text: _finite(score.logprob)}
    for token, text, logprob in score.top:
        if token != score.token:
            found[f"token_id:{token}" if text in found else text] = _finite(logprob)
    return found


def _chat_logprobs(scores: Sequence[Scored] | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    content = [
        {**_token(each.text, each.logprob), "top_logprobs": _top_tokens(each)} for each in scores
    ]
    return {"content": content, "refusal": None}


def _top_tokens(score: Scored) -> list[dict[str, Any]]:
    """Return the likeliest tokens, in which the chosen one has the text that it gave."""
    return [
        _token(score.text if token == score.token else text, logprob)
        for token, text, logprob in score.top
    ]


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    # A part of a character has no text of its own, and its bytes are not known here.
    known = REPLACEMENT not in text
    bytes_ = list(text.encode()) if known else None
    return {"token": text, "logprob": _finite(logprob), "bytes": bytes_}


def _finite(logprob: float | None) -> float | None:
    """Return a logprob that JSON can hold: an impossible token has the one of other servers."""
    if logprob is None or math.isnan(logprob):
        return None
    return max(logprob, _IMPOSSIBLE)
