"""From sampled tokens to the text that a completion shows, as they come."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


@dataclass(frozen=True)
class Scored:
    """A token with its place in the text and its logprobs.

    Attributes:
        token: its id.
        text: what it says by itself.
        offset: how many characters of text stand before it.
        logprob: under the model's own distribution; None for a prompt's first token.
        top: the likeliest tokens there, with their logprobs.
    """

    token: int
    text: str
    offset: int
    logprob: float | None
    top: tuple[tuple[str, float], ...]


class CompletionText:
    """One completion's text as it grows. What stops it does not belong to it.

    Text is held back while it may be the beginning of a stop string, or of a character.

    Args:
        tokenizer: of the model.
        stops: texts that end it.
        ends: the model's end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ends = ends
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._sent = 0
        self._begin = 0
        self.text = ""

    def begin(self) -> None:
        """Look for stop strings only in what comes from now on: what came was the prompt."""
        self._begin = len(self.text)

    def push(
        self, token: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()
    ) -> tuple[str, Scored | None]:
        """Take a token.

        Returns:
            What can be shown now, and the token as part of the text; None for an end token.
        """
        if token in self._ends:
            return "", None
        offset = len(self.text)
        self._tokens.append(token)
        self.text += self._decoder.step(self._tokenizer, token) or ""
        scored = Scored(
            token,
            self.word(token),
            offset,
            logprob,
            tuple((self.word(each), value) for each, value in top),
        )
        return self._shown(len(self.text) - self._held()), scored

    def end(self) -> str:
        """Show what is left, up to a stop string."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if whole.startswith(self.text):
            self.text = whole  # with the replacement of a character that was not completed
        at = self._stopped()
        if at is not None:
            self.text = self.text[:at]
        return self._shown(len(self.text))

    def word(self, token: int) -> str:
        """What a token says by itself."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _shown(self, until: int) -> str:
        new = self.text[self._sent : until]
        self._sent += len(new)
        return new

    def _stopped(self) -> int | None:
        """Where the first stop string stands; None: there is none."""
        places = (self.text.find(stop, self._begin) for stop in self._stops)
        return min((at for at in places if at >= 0), default=None)

    def _held(self) -> int:
        """How many characters at the end may belong to a stop string."""
        at = self._stopped()
        if at is not None:
            return len(self.text) - at
        room = len(self.text) - self._begin
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), room + 1))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )
