"""Choices: the text and logprobs of each completion, built from tokens as they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everstep.server.openai.detokenize import Scored
from everstep.server.openai.plan import Plan
from everstep.server.openai.responses import Form

Top = Sequence[tuple[int, float]]


class Choice:
    """One completion that is being built.

    Args:
        index: its index among the answer's choices.
        plan: the plan of the request.
        form: the form of its members in the answer.
    """

    def __init__(self, index: int, plan: Plan, form: Form) -> None:
        self._index = index
        self._form = form
        self._scored = plan.top is not None
        self._text = plan.text()
        self._sent = ""
        self._ready = ""

    def push_all(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None] | None,
        tops: Sequence[Top | None] | None,
    ) -> None:
        """Add tokens, with their logprobs and the likeliest tokens where they are known."""
        for index, token in enumerate(tokens):
            top = tops[index] if tops is not None else None
            self.push(token, logprobs[index] if logprobs is not None else None, top or ())

    def begin(self) -> None:
        """Begin the completion: all tokens so far were the prompt."""
        self._text.begin()

    def push(self, token: int, logprob: float | None, top: Top) -> None:
        """Add a token."""
        self._ready += self._text.push(token, logprob, top)

    def piece(self) -> dict[str, Any] | None:
        """Return the next part to send, or None if there is none yet."""
        text, self._ready = self._ready, ""
        self._sent += text
        scores = self._take_scores()
        return self._member(self._form.piece(text, scores)) if text or scores else None

    def end(self) -> None:
        """End the completion: there are no more tokens."""
        self._ready += self._text.end()

    def last(self, reason: str) -> dict[str, Any]:
        """Return the last member of its stream."""
        return {**self._member(self._form.last()), "finish_reason": reason}

    def whole(self, reason: str) -> dict[str, Any]:
        """Return the whole choice."""
        self.end()
        self._sent += self._ready
        return self._member(self._form.whole(self._sent, self._take_scores(), reason))

    def opening(self) -> dict[str, Any] | None:
        """Return the first member of its stream, or None if the stream begins with text."""
        opening = self._form.opening()
        return self._member(opening) if opening is not None else None

    def _take_scores(self) -> list[Scored] | None:
        """Take the scores of the tokens whose text is sent. Later tokens wait."""
        taken = self._text.take()
        return taken if self._scored else None

    def _member(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "finish_reason": None, **fields}
