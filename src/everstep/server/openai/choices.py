"""Choices of an answer as their tokens come: text, and logprobs of the tokens that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everstep.server.openai.answers import Form
from everstep.server.openai.plan import Plan
from everstep.server.openai.text import Scored

Top = Sequence[tuple[int, float]]


class Choice:
    """One completion on its way.

    Args:
        index: its place among the answer's choices.
        plan: what is asked.
        form: how it is written down.
    """

    def __init__(self, index: int, plan: Plan, form: Form) -> None:
        self._index = index
        self._form = form
        self._scores: list[Scored] | None = [] if plan.top is not None else None
        self._text = plan.text()
        self._shown = ""
        self._ready = ""

    def push_all(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None] | None,
        tops: Sequence[Top | None] | None,
    ) -> None:
        """Take tokens, with their logprobs and the likeliest ones where they are known."""
        for index, token in enumerate(tokens):
            top = tops[index] if tops is not None else None
            self.push(token, logprobs[index] if logprobs is not None else None, top or ())

    def begin(self) -> None:
        """What came was the prompt; the completion begins."""
        self._text.begin()

    def push(self, token: int, logprob: float | None, top: Top) -> None:
        """Take a token."""
        text, scored = self._text.push(token, logprob, top)
        self._ready += text
        if self._scores is not None and scored is not None:
            self._scores.append(scored)

    def piece(self) -> dict[str, Any] | None:
        """The next part to send; None: there is none yet."""
        text, self._ready = self._ready, ""
        self._shown += text
        scores = self._settled()
        return self._member(self._form.piece(text, scores)) if text or scores else None

    def end(self) -> None:
        """There are no more tokens."""
        self._ready += self._text.end()

    def last(self, reason: str) -> dict[str, Any]:
        """What a stream of it ends with."""
        return {**self._member(self._form.last()), "finish_reason": reason}

    def whole(self, reason: str) -> dict[str, Any]:
        """All of it."""
        self.end()
        self._shown += self._ready
        return self._member(self._form.whole(self._shown, self._settled(), reason))

    def opening(self) -> dict[str, Any] | None:
        """What a stream of it begins with; None: its text."""
        opening = self._form.opening()
        return self._member(opening) if opening is not None else None

    def _settled(self) -> list[Scored] | None:
        """The scores of tokens that begin in what is shown; the others wait, or are dropped."""
        if self._scores is None:
            return None
        settled = [each for each in self._scores if each.offset < len(self._shown)]
        self._scores = self._scores[len(settled) :]
        return settled

    def _member(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "finish_reason": None, **fields}
